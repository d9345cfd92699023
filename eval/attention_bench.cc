#include "eval/attention_bench.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>

#include "fmt/format.h"
#include "kernels/selector.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// The same sidecars for all policies of a run. Errors: two that cannot be kept at once.
StatusOr<SidecarConfig> UnionOf(const AttentionBenchOptions& options) {
  SidecarConfig all;
  for (const auto& [name, policy] : options.policies) {
    if (policy == nullptr) continue;
    const SidecarConfig needed = SidecarsOf(*policy);
    const auto add_bits = [](int& kept, int more) {
      if (more != 0 && kept == 0) kept = more;
    };
    all.ranges |= needed.ranges;
    all.mean_values |= needed.mean_values;
    add_bits(all.block_quant_bits, needed.block_quant_bits);
    add_bits(all.min_max_quant_bits, needed.min_max_quant_bits);
    add_bits(all.max_quant_bits, needed.max_quant_bits);
    add_bits(all.label_bits, needed.label_bits);
    if (all.label_channels == nullptr) all.label_channels = needed.label_channels;
    if (!Covers(all, needed)) {
      return InvalidArgument(
          "the policy \"{}\" needs a sidecar in another shape than those before "
          "it: measure it in a run of its own",
          name);
    }
  }
  return all;
}

// One layer of a profile, copied for `batch` sequences to random blocks.
class LayerReplay {
 public:
  [[nodiscard]] static StatusOr<LayerReplay> Create(const AttentionProfile& profile,
                                                    const AttentionProfile::Layer& layer,
                                                    const SidecarConfig& sidecars, int context,
                                                    int batch, Ops& ops) {
    LayerReplay replay(profile, sidecars, context, batch, ops);
    GLOAM_RETURN_IF_ERROR(replay.Fill(layer));
    return replay;
  }

  // Microseconds of one call.
  double Dense() {
    const Clock::time_point start = Clock::now();
    ops_->Attention({.batch = Batch(), .q = q_, .kv = kv_, .scale = Scale(), .out = out_});
    return Microseconds(Clock::now() - start);
  }

  double Sparse(const SparsityPolicy& policy, SparseStageTimes& times) {
    std::vector<SparseRow> rows;
    for (int i = 0; i < batch_; ++i) rows.push_back({.token = i, .seq = i, .policy = &policy});
    stats_.resize(rows.size() * kv_.layout.num_kv_heads);
    const Clock::time_point start = Clock::now();
    ops_->SparseAttention({.batch = Batch(),
                           .q = q_,
                           .kv = kv_,
                           .sidecars = sidecars_,
                           .scale = Scale(),
                           .layer = layer_,
                           .rows = rows,
                           .stats = stats_.data(),
                           .out = out_,
                           .times = &times});
    return Microseconds(Clock::now() - start);
  }

  const std::vector<SparseHeadStats>& stats() const { return stats_; }

 private:
  LayerReplay(const AttentionProfile& profile, const SidecarConfig& sidecars, int context,
              int batch, Ops& ops)
      : profile_(&profile),
        config_(std::make_unique<SidecarConfig>(sidecars)),
        context_(context),
        batch_(batch),
        ops_(&ops) {}

  static double Microseconds(Clock::duration duration) {
    return std::chrono::duration<double, std::micro>(duration).count();
  }
  float Scale() const { return 1.0f / std::sqrt(static_cast<float>(profile_->kv.head_dim)); }

  Status Fill(const AttentionProfile::Layer& layer) {
    const int num_blocks = (context_ + kBlockTokens - 1) / kBlockTokens;
    layer_ = layer.layer;
    kv_.layout = profile_->kv;
    kv_.num_blocks = int64_t{num_blocks} * batch_;
    const int64_t block_bytes = kv_.layout.block_bytes();
    GLOAM_ASSIGN_OR_RETURN(Buffer memory, Take(kv_.num_blocks * block_bytes));
    kv_.data = memory.data();
    buffers_.push_back(std::move(memory));
    tables_.resize(kv_.num_blocks);
    std::iota(tables_.begin(), tables_.end(), 0);
    std::shuffle(tables_.begin(), tables_.end(), std::mt19937(1));
    for (int64_t i = 0; i < kv_.num_blocks; ++i) {
      std::memcpy(static_cast<std::byte*>(kv_.data) + tables_[i] * block_bytes,
                  layer.kv_cache.data() + i % num_blocks * block_bytes, block_bytes);
    }
    GLOAM_RETURN_IF_ERROR(FillSidecars());

    // Sequence i decodes with the i-th kept query.
    const int64_t row = int64_t{profile_->num_heads} * kv_.layout.head_dim;
    GLOAM_ASSIGN_OR_RETURN(Buffer queries, Take(2 * batch_ * row * sizeof(float)));
    auto* data = static_cast<float*>(queries.data());
    for (int i = 0; i < batch_; ++i) {
      const int64_t query = i % profile_->num_queries;
      std::copy_n(layer.queries.begin() + query * row, row, data + i * row);
    }
    q_ = TensorView::Contiguous(data, DType::kF32, Device::kCpu,
                                {batch_, profile_->num_heads, kv_.layout.head_dim});
    out_ = TensorView::Contiguous(data + batch_ * row, DType::kF32, Device::kCpu,
                                  {batch_, profile_->num_heads, kv_.layout.head_dim});
    buffers_.push_back(std::move(queries));
    cu_seqlens_.resize(batch_ + 1);
    std::iota(cu_seqlens_.begin(), cu_seqlens_.end(), 0);
    context_lens_.assign(batch_, context_);
    positions_.assign(batch_, context_ - 1);
    return OkStatus();
  }

  Status FillSidecars() {
    if (config_->empty()) return OkStatus();
    sidecars_.config = config_.get();
    sidecars_.num_kv_heads = kv_.layout.num_kv_heads;
    sidecars_.num_blocks = kv_.num_blocks;
    for (int kind = 0; kind < kNumSidecarKinds; ++kind) {
      const int64_t bytes = SidecarBytes(static_cast<SidecarKind>(kind), *config_, kv_.layout);
      sidecars_.head_bytes[kind] = bytes;
      if (bytes == 0) continue;
      GLOAM_ASSIGN_OR_RETURN(Buffer buffer, Take(bytes * kv_.layout.num_kv_heads * kv_.num_blocks));
      sidecars_.data[kind] = static_cast<std::byte*>(buffer.data());
      buffers_.push_back(std::move(buffer));
    }
    // All tokens of all sequences as one step.
    std::vector<int32_t> positions, cu_seqlens = {0};
    for (int i = 0; i < batch_; ++i) {
      for (int p = 0; p < context_; ++p) positions.push_back(p);
      cu_seqlens.push_back(static_cast<int32_t>(positions.size()));
    }
    const std::vector<int32_t> context_lens(batch_, context_);
    SequenceBatch all = Batch();
    all.num_tokens = batch_ * context_;
    all.num_seqs = batch_;
    all.positions = positions.data();
    all.cu_seqlens = cu_seqlens.data();
    all.context_lens = context_lens.data();
    ops_->UpdateSidecars({.batch = all, .kv = kv_, .sidecars = sidecars_, .layer = layer_});
    return OkStatus();
  }

  StatusOr<Buffer> Take(size_t bytes) { return ops_->Allocate(bytes); }

  SequenceBatch Batch() const {
    return {.num_seqs = batch_,
            .num_tokens = batch_,
            .max_blocks_per_seq = static_cast<int>(kv_.num_blocks / batch_),
            .positions = positions_.data(),
            .cu_seqlens = cu_seqlens_.data(),
            .context_lens = context_lens_.data(),
            .block_tables = tables_.data()};
  }

  const AttentionProfile* profile_;
  std::unique_ptr<SidecarConfig> config_;
  int context_;
  int batch_;
  int layer_ = 0;
  Ops* ops_;
  std::vector<Buffer> buffers_;
  KvLayerView kv_;
  SidecarLayerView sidecars_;
  TensorView q_, out_;
  std::vector<int32_t> tables_, cu_seqlens_, context_lens_, positions_;
  std::vector<SparseHeadStats> stats_;
};

// Bytes that the stages read for one row and KV head, from what was kept.
struct StageBytes {
  double select = 0, estimate = 0, attend = 0, tail = 0;
};
StageBytes BytesOf(const SparsityPolicy& policy, const KvLayout& kv, const SparseHeadStats& head,
                   double candidate_blocks) {
  const SidecarConfig sidecars = SidecarsOf(policy);
  const double blocks = (head.context - 1) / kBlockTokens;
  const auto bytes = [&](SidecarKind kind) {
    return static_cast<double>(SidecarBytes(kind, sidecars, kv));
  };
  const double element = static_cast<double>(DTypeBytes(kv.dtype));
  StageBytes result;
  SidecarConfig selected;
  policy.selector.selector->AddSidecars(policy.selector, selected);
  if (selected.ranges) result.select += blocks * bytes(SidecarKind::kRanges);
  if (selected.label_bits != 0) result.select += blocks * bytes(SidecarKind::kLabels);
  switch (policy.estimator.type) {
    case EstimatorType::kNone:
      if (policy.pruner.type != PrunerType::kNone) {
        result.estimate = candidate_blocks * kBlockTokens * kv.head_dim * element;
      }
      break;
    case EstimatorType::kMinMaxQuant:
      result.estimate = candidate_blocks * bytes(SidecarKind::kMinMaxQuant);
      break;
    case EstimatorType::kMaxQuant:
      result.estimate = candidate_blocks * bytes(SidecarKind::kMaxQuant);
      break;
    case EstimatorType::kBlockQuant:
      result.estimate =
          candidate_blocks * (bytes(SidecarKind::kBlockQuant) + bytes(SidecarKind::kRanges));
      break;
  }
  result.attend = 2.0 * head.loaded * kv.head_dim * element;
  if (policy.tail == TailType::kBlockMean) result.tail = blocks * bytes(SidecarKind::kMeanValues);
  return result;
}

// Stages of SparseStageTimes and the names of their fields in a row.
constexpr std::pair<std::atomic<int64_t> SparseStageTimes::*, const char*> kStages[] = {
    {&SparseStageTimes::select, "select_us"}, {&SparseStageTimes::estimate, "estimate_us"},
    {&SparseStageTimes::prune, "prune_us"},   {&SparseStageTimes::attend, "attend_us"},
    {&SparseStageTimes::tail, "tail_us"},
};

// Means over layers of one policy's medians at one shape. A repeat runs through all layers, as a
// decode step does: a layer's keys have left the nearer caches when it comes again.
nlohmann::ordered_json MeasurePolicy(std::vector<LayerReplay>& layers,
                                     const AttentionProfile& profile, const SparsityPolicy* policy,
                                     int repeats) {
  std::vector<std::vector<double>> runs(layers.size());
  std::vector<std::array<std::vector<double>, std::size(kStages)>> stage_runs(layers.size());
  for (int i = -1; i < repeats; ++i) {
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      SparseStageTimes times;
      const double run =
          policy == nullptr ? layers[layer].Dense() : layers[layer].Sparse(*policy, times);
      if (i < 0) continue;
      runs[layer].push_back(run);
      for (size_t stage = 0; stage < std::size(kStages); ++stage) {
        stage_runs[layer][stage].push_back(
            static_cast<double>((times.*kStages[stage].first).load()) * 1e-3);
      }
    }
  }
  double us = 0;
  std::array<double, std::size(kStages)> stage_us = {};
  StageBytes bytes;
  double kept = 0, loaded = 0, candidates = 0;
  double num_heads = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    us += Median(runs[i]);
    if (policy == nullptr) continue;
    for (size_t stage = 0; stage < stage_us.size(); ++stage) {
      stage_us[stage] += Median(stage_runs[i][stage]);
    }
    for (const SparseHeadStats& head : layers[i].stats()) {
      // An upper bound of the blocks in which some head has a candidate.
      const double blocks = std::min<double>(
          (head.context - 1) / kBlockTokens,
          head.candidates * profile.num_heads / profile.kv.num_kv_heads / kBlockTokens);
      const StageBytes one = BytesOf(*policy, profile.kv, head, blocks);
      bytes.select += one.select;
      bytes.estimate += one.estimate;
      bytes.attend += one.attend;
      bytes.tail += one.tail;
      kept += head.kept;
      loaded += head.loaded;
      candidates += head.candidates;
      num_heads += 1;
    }
  }
  const auto num_layers = static_cast<double>(layers.size());
  nlohmann::ordered_json row;
  row["us"] = us / num_layers;
  if (policy == nullptr) return row;
  for (size_t stage = 0; stage < stage_us.size(); ++stage) {
    row[kStages[stage].second] = stage_us[stage] / num_layers;
  }
  row["select_bytes"] = bytes.select / num_layers;
  row["estimate_bytes"] = bytes.estimate / num_layers;
  row["attend_bytes"] = bytes.attend / num_layers;
  row["tail_bytes"] = bytes.tail / num_layers;
  row["candidates_per_head"] = candidates / num_heads;
  row["kept_per_head"] = kept / num_heads;
  row["loaded_per_kv_head"] = loaded / num_heads;
  return row;
}

}  // namespace

StatusOr<nlohmann::ordered_json> RunAttentionBench(const AttentionProfile& profile, Ops& ops,
                                                   const AttentionBenchOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const SidecarConfig sidecars, UnionOf(options));
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const int context : options.contexts) {
    if (context < 1 || context > profile.context) {
      return InvalidArgument("--context {} is not in [1, {}], what the profile holds", context,
                             profile.context);
    }
    for (const int batch : options.batches) {
      std::vector<LayerReplay> layers;
      for (const AttentionProfile::Layer& layer : profile.layers) {
        GLOAM_ASSIGN_OR_RETURN(LayerReplay replay,
                               LayerReplay::Create(profile, layer, sidecars, context, batch, ops));
        layers.push_back(std::move(replay));
      }
      const double dense_us =
          MeasurePolicy(layers, profile, nullptr, options.repeats)["us"].get<double>();
      const double dense_bytes = 2.0 * context * batch * profile.kv.num_kv_heads *
                                 profile.kv.head_dim *
                                 static_cast<double>(DTypeBytes(profile.kv.dtype));
      for (const auto& [name, policy] : options.policies) {
        nlohmann::ordered_json row = {{"context", context}, {"batch", batch}, {"policy", name}};
        if (policy == nullptr) {
          row.update({{"us", dense_us}, {"attend_bytes", dense_bytes}});
        } else {
          row.update(MeasurePolicy(layers, profile, policy.get(), options.repeats));
        }
        row["speedup"] = dense_us / row["us"].get<double>();
        rows.push_back(std::move(row));
      }
    }
  }
  return rows;
}

std::string FormatAttentionBench(const nlohmann::ordered_json& rows) {
  std::string table = fmt::format(
      "{:>7} {:>5} {:<24} {:>9} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9}\n", "context",
      "batch", "policy", "us", "x dense", "select", "estimate", "prune", "attend", "tail", "kept",
      "loaded", "MB read");
  for (const auto& row : rows) {
    const auto number = [&](const char* key) { return row.value(key, 0.0); };
    const double bytes = number("select_bytes") + number("estimate_bytes") +
                         number("attend_bytes") + number("tail_bytes");
    table += fmt::format(
        "{:>7} {:>5} {:<24} {:>9.1f} {:>7.2f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>9.1f} "
        "{:>8.0f} {:>8.0f} {:>9.3f}\n",
        row["context"].get<int>(), row["batch"].get<int>(), row["policy"].get<std::string>(),
        number("us"), number("speedup"), number("select_us"), number("estimate_us"),
        number("prune_us"), number("attend_us"), number("tail_us"), number("kept_per_head"),
        number("loaded_per_kv_head"), bytes / 1e6);
  }
  return table;
}

}  // namespace gloam
