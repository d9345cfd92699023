// `gloam bench attention --random-weights SHAPE`: dense decode attention of a model's shape alone,
// on random queries, keys and values, beside the time that reading the cache takes at the device's
// measured read rate.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#include "engine/block_manager.h"
#include "engine/kv_cache_pool.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "server/cli/backend.h"
#include "server/cli/bench_model.h"
#include "server/cli/cli.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;
using json = nlohmann::ordered_json;

constexpr int64_t kMarginBytes = int64_t{1} << 30;  // of the device's memory, left free
// What the layers that run in turn have together, at least: no cache holds it.
constexpr int64_t kChainBytes = int64_t{1} << 30;

// Sequences whose blocks lie at random places of several layers' caches.
class DenseAttentionBench {
 public:
  static StatusOr<std::unique_ptr<DenseAttentionBench>> Create(
      const BenchAttentionOptions& options) {
    std::unique_ptr<DenseAttentionBench> bench(new DenseAttentionBench(options));
    GLOAM_RETURN_IF_ERROR(bench->SetUp());
    return bench;
  }

  // Microseconds of a layer for sequences that have so much context, the step's token included.
  StatusOr<json> Measure(int batch, int context) {
    json row = {{"batch", batch}, {"context", context}};
    KvPlan plan = {.layout = layout_, .num_blocks = int64_t{batch} * BlocksFor(context)};
    const int64_t layer_bytes = plan.num_blocks * layout_.block_bytes();
    const int64_t room = (ops_->memory().free_bytes - kMarginBytes) / layer_bytes;
    if (room < 1) return WithoutRoom(std::move(row));
    const int64_t wanted = (kChainBytes + layer_bytes - 1) / layer_bytes;
    const int num_layers = static_cast<int>(std::min({wanted, room, int64_t{config_.num_layers}}));
    plan.bytes_per_block = num_layers * layout_.block_bytes();
    GLOAM_ASSIGN_OR_RETURN(const KvCachePool pool, KvCachePool::Create(*ops_, plan, num_layers));
    for (const KvLayerView& layer : pool.layers()) {
      FillRandom(*ops_, layout_.dtype, layer.data, static_cast<size_t>(layer_bytes), random_);
    }
    GLOAM_ASSIGN_OR_RETURN(const Inputs inputs, MakeInputs(batch, context));

    const double us = Time(inputs, pool.layers());
    const double bytes = 2.0 * batch * context * layout_.num_kv_heads * layout_.head_dim *
                         static_cast<double>(DTypeBytes(layout_.dtype));
    row["us"] = us;
    row["layers"] = num_layers;
    row["megabytes"] = bytes / 1e6;
    row["gigabytes_per_second"] = bytes / us / 1e3;
    row["percent_of_read_rate"] = 100 * bytes / us * 1e6 / read_rate_;
    return row;
  }

  json Facts() const {
    return {{"device", ops_->DeviceName()},
            {"shape", config_.name},
            {"heads", config_.num_heads},
            {"kv_heads", config_.num_kv_heads},
            {"head_dim", config_.head_dim},
            {"kv_cache_dtype", KvDTypeName(layout_.dtype)},
            {"read_gigabytes_per_second", read_rate_ / 1e9},
            {"batch_invariant", options_.model.settings.batch_invariant}};
  }

 private:
  // The step's arrays, queries and results, on the device.
  struct Inputs {
    std::vector<Buffer> memory;
    std::vector<int32_t> host_cu_seqlens, host_context_lens;
    SequenceBatch batch;
    TensorView q, out;
  };

  explicit DenseAttentionBench(const BenchAttentionOptions& options) : options_(options) {}

  Status SetUp() {
    GLOAM_ASSIGN_OR_RETURN(ops_, MakeBackend(options_.model.settings));
    GLOAM_ASSIGN_OR_RETURN(const auto file, OpenBenchModel(options_.model));
    config_ = file->config();
    layout_ = {.dtype = KvDTypeOf(options_.model.settings, config_),
               .num_kv_heads = config_.num_kv_heads,
               .head_dim = config_.head_dim};
    read_rate_ = ops_->MeasureReadRate();
    const int max_batch = *std::max_element(options_.batches.begin(), options_.batches.end());
    return ops_->Reserve(
        {.max_tokens = max_batch,
         .max_seqs = max_batch,
         .max_context = *std::max_element(options_.contexts.begin(), options_.contexts.end()),
         .max_logit_rows = 1,
         .num_heads = config_.num_heads,
         .num_kv_heads = config_.num_kv_heads,
         .head_dim = config_.head_dim,
         .hidden_size = config_.hidden_size,
         .intermediate_size = config_.intermediate_size,
         .vocab_size = config_.vocab_size,
         .kv_dtype = layout_.dtype});
  }

  StatusOr<Inputs> MakeInputs(int batch, int context) {
    Inputs inputs;
    inputs.host_cu_seqlens.resize(batch + 1);
    std::iota(inputs.host_cu_seqlens.begin(), inputs.host_cu_seqlens.end(), 0);
    inputs.host_context_lens.assign(batch, context);
    std::vector<int32_t> blocks(static_cast<size_t>(batch) * BlocksFor(context));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random_);
    SequenceBatch& seqs = inputs.batch;
    seqs.num_seqs = seqs.num_tokens = batch;
    seqs.max_blocks_per_seq = BlocksFor(context);
    seqs.host_cu_seqlens = inputs.host_cu_seqlens.data();
    seqs.host_context_lens = inputs.host_context_lens.data();
    GLOAM_ASSIGN_OR_RETURN(seqs.cu_seqlens, Upload(inputs.host_cu_seqlens, inputs));
    GLOAM_ASSIGN_OR_RETURN(seqs.context_lens, Upload(inputs.host_context_lens, inputs));
    GLOAM_ASSIGN_OR_RETURN(seqs.block_tables, Upload(blocks, inputs));
    GLOAM_ASSIGN_OR_RETURN(seqs.positions,
                           Upload(std::vector<int32_t>(batch, context - 1), inputs));
    GLOAM_ASSIGN_OR_RETURN(inputs.q, MakeHeads(ops_->QueryDType(layout_.dtype), batch, inputs));
    GLOAM_ASSIGN_OR_RETURN(inputs.out, MakeHeads(ops_->activation_dtypes().input, batch, inputs));
    return inputs;
  }

  StatusOr<const int32_t*> Upload(const std::vector<int32_t>& values, Inputs& inputs) {
    const size_t bytes = values.size() * sizeof(int32_t);
    GLOAM_ASSIGN_OR_RETURN(Buffer buffer, ops_->Allocate(bytes));
    ops_->Upload(buffer.data(), values.data(), bytes);
    inputs.memory.push_back(std::move(buffer));
    return static_cast<const int32_t*>(inputs.memory.back().data());
  }

  // [batch, num_heads, head_dim] of random values.
  StatusOr<TensorView> MakeHeads(DType dtype, int batch, Inputs& inputs) {
    const size_t bytes =
        static_cast<size_t>(batch) * config_.num_heads * config_.head_dim * DTypeBytes(dtype);
    GLOAM_ASSIGN_OR_RETURN(Buffer buffer, ops_->Allocate(bytes));
    FillRandom(*ops_, dtype, buffer.data(), bytes, random_);
    inputs.memory.push_back(std::move(buffer));
    return TensorView::Contiguous(inputs.memory.back().data(), dtype, ops_->device(),
                                  {batch, config_.num_heads, config_.head_dim});
  }

  // Of a layer, the median over repeated passes over all layers.
  double Time(const Inputs& inputs, std::span<const KvLayerView> layers) {
    const uint64_t key = ++last_key_;
    const auto pass = [&] {
      ops_->PlanAttention({.batch = inputs.batch, .kv = layout_, .num_heads = config_.num_heads});
      for (const KvLayerView& layer : layers) {
        ops_->Attention({.batch = inputs.batch,
                         .q = inputs.q,
                         .kv = layer,
                         .scale = 1 / std::sqrt(static_cast<float>(config_.head_dim)),
                         .out = inputs.out});
      }
    };
    std::vector<double> us;
    constexpr int kWarmUps = 3;  // the first load kernels and record
    for (int i = 0; i < kWarmUps + options_.repeats; ++i) {
      uint16_t taken = 0;
      const auto start = Clock::now();
      ops_->Repeat(key, pass);
      ops_->Download(&taken, inputs.out.data, sizeof(taken));  // waits
      const std::chrono::duration<double, std::micro> elapsed = Clock::now() - start;
      if (i >= kWarmUps) us.push_back(elapsed.count() / static_cast<double>(layers.size()));
    }
    return Median(std::move(us));
  }

  static json WithoutRoom(json row) {
    row["us"] = nullptr;
    row["note"] = "the KV cache does not fit";
    return row;
  }

  const BenchAttentionOptions& options_;
  std::mt19937_64 random_{1};
  std::unique_ptr<Ops> ops_;
  ModelConfig config_;
  KvLayout layout_;
  double read_rate_ = 0;
  uint64_t last_key_ = 0;
};

}  // namespace

Status RunBenchDenseAttention(const BenchAttentionOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const auto bench, DenseAttentionBench::Create(options));
  json rows = json::array();
  for (const int batch : options.batches) {
    for (const int context : options.contexts) {
      GLOAM_ASSIGN_OR_RETURN(json row, bench->Measure(batch, context));
      rows.push_back(std::move(row));
    }
  }
  if (options.json) {
    fmt::print("{}\n", json{{"facts", bench->Facts()}, {"rows", rows}}.dump(1));
    return OkStatus();
  }
  fmt::print("{}\n{:>6} {:>8} {:>10} {:>9} {:>8} {:>7}\n", bench->Facts().dump(1), "batch",
             "context", "us", "MB", "GB/s", "% read");
  for (const json& row : rows) {
    fmt::print("{:>6} {:>8} ", row["batch"].get<int>(), row["context"].get<int>());
    if (row["us"].is_null()) {
      fmt::print("{}\n", row["note"].get<std::string>());
      continue;
    }
    fmt::print("{:>10.1f} {:>9.1f} {:>8.0f} {:>7.1f}\n", row["us"].get<double>(),
               row["megabytes"].get<double>(), row["gigabytes_per_second"].get<double>(),
               row["percent_of_read_rate"].get<double>());
  }
  return OkStatus();
}

}  // namespace gloam
