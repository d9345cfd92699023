// `gloam bench step` and `gloam bench prefill`: the engine's model runner without requests: what a
// step costs by batch and context, beside the time that reading its bytes takes at the device's
// measured read rate.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <numeric>
#include <random>

#include "engine/kv_cache_pool.h"
#include "engine/model_runner.h"
#include "models/llama.h"
#include "nlohmann/json.hpp"
#include "server/cli/backend.h"
#include "server/cli/bench_model.h"
#include "server/cli/cli.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;
using json = nlohmann::ordered_json;

constexpr int kWarmUpSteps = 4;                     // the first loads kernels, the second records
constexpr int64_t kMarginBytes = int64_t{2} << 30;  // for recorded steps and the rest of the device

double Milliseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::milli>(duration).count();
}

// Weights of the layers' matrices: what every token is multiplied with, the head aside.
double LayerWeights(const ModelConfig& c) {
  const double attention = 2.0 * (c.num_heads + c.num_kv_heads) * c.head_dim;
  return double(c.num_layers) * c.hidden_size * (attention + 3.0 * c.intermediate_size);
}

// Sequences over a cache of their own; every one has blocks at random places.
class StepBench {
 public:
  static StatusOr<std::unique_ptr<StepBench>> Create(const BenchStepOptions& options) {
    std::unique_ptr<StepBench> bench(new StepBench(options));
    GLOAM_RETURN_IF_ERROR(bench->SetUp());
    return bench;
  }

  // One row per batch and context: milliseconds of a decode step, sampling included.
  json Decode(int batch, int context) {
    json row = {{"phase", "decode"}, {"batch", batch}, {"context", context}};
    const int num_steps = kWarmUpSteps + options_.steps + 1;
    if (!Fits(batch, context + num_steps)) return WithoutRoom(std::move(row));
    StartSequences(batch, context, context, context + num_steps);
    StepPlan plan;
    plan.num_tokens = plan.num_sample_rows = batch;
    for (Sequence& sequence : sequences_) {
      plan.sequences.push_back({.sequence = &sequence, .num_tokens = 1, .samples = true});
    }
    // As in the engine, a step is enqueued before the tokens of the one before are read.
    std::vector<double> ms;
    Clock::time_point last_read;
    for (int i = 0; i < num_steps; ++i) {
      const LogitRows logits = runner_->Forward(plan, /*is_greedy=*/true).sample;
      if (i > 0) ops_->FinishSample();
      const Clock::time_point read = Clock::now();
      if (i > kWarmUpSteps) ms.push_back(Milliseconds(read - last_read));
      last_read = read;
      Sample(logits);
      Advance(plan);
    }
    ops_->FinishSample();
    const double median = Median(ms);
    const int64_t kv_bytes = int64_t{batch} * BlocksFor(context) * kv_plan_.bytes_per_block;
    const double gigabytes = static_cast<double>(StepWeightBytes() + kv_bytes) / 1e9;
    // The first step that counts has context + kWarmUpSteps + 1 tokens, the last steps - 1 more.
    row["mean_context"] = context + kWarmUpSteps + (options_.steps + 1) / 2.0;
    row["ms"] = median;
    row["min_ms"] = *std::min_element(ms.begin(), ms.end());
    row["tokens_per_second"] = batch / median * 1e3;
    row["gigabytes"] = gigabytes;
    row["gigabytes_per_second"] = gigabytes / median * 1e3;
    row["percent_of_read_rate"] = 100 * gigabytes / median * 1e3 / (read_rate_ / 1e9);
    return row;
  }

  // Milliseconds from the first chunk of a prompt to its first token.
  json Prefill(int context) {
    json row = {{"phase", "prefill"}, {"batch", 1}, {"context", context}};
    if (!Fits(1, context + 1)) return WithoutRoom(std::move(row));
    std::vector<double> ms;
    for (int i = 0; i < 1 + options_.prefill_repeats; ++i) {
      StartSequences(1, context, 0, context + 1);
      const double prompt_ms = RunPrompt(context);
      if (i > 0) ms.push_back(prompt_ms);
    }
    const double median = Median(ms);
    row["ms"] = median;
    row["tokens_per_second"] = context / median * 1e3;
    row["teraflops"] = PrefillFlops(context) / median / 1e9;
    return row;
  }

  json Facts() const {
    return {{"device", ops_->DeviceName()},
            {"model", model_->config().name},
            {"weight_bytes", model_->weight_bytes()},
            {"read_gigabytes_per_second", read_rate_ / 1e9},
            {"load_seconds", load_seconds_},
            {"kv_cache_dtype", KvDTypeName(kv_plan_.layout.dtype)},
            {"kv_blocks", kv_plan_.num_blocks},
            {"batch_invariant", options_.model.settings.batch_invariant}};
  }

 private:
  explicit StepBench(const BenchStepOptions& options) : options_(options) {}

  Status SetUp() {
    GLOAM_ASSIGN_OR_RETURN(ops_, MakeBackend(options_.model.settings));
    const auto start = Clock::now();
    GLOAM_ASSIGN_OR_RETURN(const auto file, OpenBenchModel(options_.model));
    GLOAM_ASSIGN_OR_RETURN(model_, Llama::Load(*file, *ops_, {}));
    load_seconds_ = std::chrono::duration<double>(Clock::now() - start).count();
    read_rate_ = ops_->MeasureReadRate();

    const int max_batch = *std::max_element(options_.batches.begin(), options_.batches.end());
    const int max_context = *std::max_element(options_.contexts.begin(), options_.contexts.end());
    const int num_new_tokens = kWarmUpSteps + options_.steps + 1;
    const ModelConfig& config = model_->config();
    kv_plan_.layout = {.dtype = KvDTypeOf(options_.model.settings, config),
                       .num_kv_heads = config.num_kv_heads,
                       .head_dim = config.head_dim};
    limits_ = {.max_num_seqs = max_batch,
               .max_num_batched_tokens =
                   std::max(max_batch, BatchedTokensOf(options_.model.settings, *ops_).max),
               .max_model_len = max_context + num_new_tokens,
               .kv_dtype = kv_plan_.layout.dtype};
    GLOAM_ASSIGN_OR_RETURN(ModelRunner runner, ModelRunner::Create(limits_, *ops_, *model_));
    runner_ = std::make_unique<ModelRunner>(std::move(runner));

    // No more of the cache than the largest cell that fits needs.
    kv_plan_.bytes_per_block = config.num_layers * kv_plan_.layout.block_bytes();
    const int64_t room = (ops_->memory().free_bytes - kMarginBytes) / kv_plan_.bytes_per_block;
    kv_plan_.num_blocks = 1;
    for (const int batch : options_.batches) {
      for (const int context : options_.contexts) {
        const int64_t blocks = int64_t{batch} * BlocksFor(context + num_new_tokens);
        if (blocks <= room) kv_plan_.num_blocks = std::max(kv_plan_.num_blocks, blocks);
      }
    }
    GLOAM_ASSIGN_OR_RETURN(KvCachePool pool,
                           KvCachePool::Create(*ops_, kv_plan_, config.num_layers));
    pool_ = std::make_unique<KvCachePool>(std::move(pool));
    runner_->SetCache(pool_->layers(), {});
    for (const KvLayerView& layer : pool_->layers()) {
      FillRandom(*ops_, layer.layout.dtype, layer.data,
                 static_cast<size_t>(layer.num_blocks * layer.layout.block_bytes()), random_);
    }
    blocks_.resize(kv_plan_.num_blocks);
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::shuffle(blocks_.begin(), blocks_.end(), random_);
    return OkStatus();
  }

  bool Fits(int batch, int tokens) const {
    return int64_t{batch} * BlocksFor(tokens) <= kv_plan_.num_blocks;
  }
  static json WithoutRoom(json row) {
    row["ms"] = nullptr;
    row["note"] = "the KV cache does not fit";
    return row;
  }

  // With room for `max_tokens` each, of which they have one after `context`.
  void StartSequences(int batch, int context, int num_computed, int max_tokens) {
    sequences_ = std::vector<Sequence>(batch);
    int64_t next_block = 0;
    for (Sequence& sequence : sequences_) {
      sequence.tokens.resize(context + 1);
      for (int32_t& token : sequence.tokens) {
        token = static_cast<int32_t>(random_() % model_->config().vocab_size);
      }
      sequence.num_computed = num_computed;
      const int num_blocks = BlocksFor(max_tokens);
      sequence.table.blocks.assign(blocks_.begin() + next_block,
                                   blocks_.begin() + next_block + num_blocks);
      sequence.table.version = ++table_version_;
      next_block += num_blocks;
    }
  }

  void Advance(const StepPlan& plan) {
    for (const ScheduledSequence& scheduled : plan.sequences) {
      scheduled.sequence->num_computed += scheduled.num_tokens;
    }
  }

  // Every sequence's next token becomes its input.
  void Sample(const LogitRows& logits) {
    rows_.assign(sequences_.size(), SampleRow{.temperature = 0});
    results_.assign(sequences_.size(), {});
    ops_->Sample({.logits = logits, .rows = rows_, .results = results_});
    const bool is_known = ops_->device() == Device::kCpu;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i].tokens.push_back(is_known ? results_[i].token : 0);
      sequences_[i].drawn_in_row = is_known ? -1 : static_cast<int>(i);
    }
  }

  double RunPrompt(int context) {
    const auto start = Clock::now();
    Sequence& sequence = sequences_.front();
    while (sequence.num_computed < context) {
      StepPlan plan;
      plan.num_tokens = std::min(limits_.max_num_batched_tokens, context - sequence.num_computed);
      const bool last = sequence.num_computed + plan.num_tokens == context;
      plan.num_sample_rows = last ? 1 : 0;
      plan.sequences.push_back(
          {.sequence = &sequence, .num_tokens = plan.num_tokens, .samples = last});
      const LogitRows logits = runner_->Forward(plan, /*is_greedy=*/true).sample;
      if (last) Sample(logits);
      Advance(plan);
    }
    ops_->FinishSample();
    return Milliseconds(Clock::now() - start);
  }

  // What a decode step reads of the weights: all but the embedding where the head is another.
  int64_t StepWeightBytes() const {
    const ModelConfig& c = model_->config();
    if (c.tie_embeddings) return model_->weight_bytes();
    const double head = double(c.vocab_size) * c.hidden_size;
    const double share = (LayerWeights(c) + head) / (LayerWeights(c) + 2 * head);
    return static_cast<int64_t>(static_cast<double>(model_->weight_bytes()) * share);
  }

  double PrefillFlops(int context) const {
    const ModelConfig& c = model_->config();
    const double attention = 2.0 * c.num_layers * c.num_heads * c.head_dim * context;  // causal
    return context * (2 * LayerWeights(c) + attention);
  }

  const BenchStepOptions& options_;
  std::mt19937_64 random_{1};
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Model> model_;
  double load_seconds_ = 0;
  double read_rate_ = 0;
  KvPlan kv_plan_;
  ModelRunnerLimits limits_;
  std::unique_ptr<KvCachePool> pool_;
  std::unique_ptr<ModelRunner> runner_;
  std::vector<int32_t> blocks_;  // of the cache, in random order
  uint64_t table_version_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<SampleRow> rows_;
  std::vector<SampleResult> results_;
};

void PrintTable(const json& rows) {
  fmt::print("{:>8} {:>6} {:>8} {:>10} {:>12} {:>9} {:>7}\n", "phase", "batch", "context", "ms",
             "tokens/s", "GB/s", "% read");
  for (const json& row : rows) {
    fmt::print("{:>8} {:>6} {:>8} ", row["phase"].get<std::string>(), row["batch"].get<int>(),
               row["context"].get<int>());
    if (row["ms"].is_null()) {
      fmt::print("{}\n", row["note"].get<std::string>());
    } else if (row["phase"] == "prefill") {
      fmt::print("{:>10.2f} {:>12.0f} {:>9} {:>7}  {:.0f} TFLOP/s\n", row["ms"].get<double>(),
                 row["tokens_per_second"].get<double>(), "", "", row["teraflops"].get<double>());
    } else {
      fmt::print("{:>10.3f} {:>12.1f} {:>9.0f} {:>7.1f}\n", row["ms"].get<double>(),
                 row["tokens_per_second"].get<double>(), row["gigabytes_per_second"].get<double>(),
                 row["percent_of_read_rate"].get<double>());
    }
  }
}

Status Run(const BenchStepOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<StepBench> bench, StepBench::Create(options));
  json rows = json::array();
  for (const int context : options.contexts) {
    if (options.prefill) {
      rows.push_back(bench->Prefill(context));
      continue;
    }
    for (const int batch : options.batches) rows.push_back(bench->Decode(batch, context));
  }
  if (options.json) {
    fmt::print("{}\n", json{{"facts", bench->Facts()}, {"rows", rows}}.dump(1));
  } else {
    fmt::print("{}\n", bench->Facts().dump(1));
    PrintTable(rows);
  }
  return OkStatus();
}

}  // namespace

int RunBenchStep(const BenchStepOptions& options) {
  const Status status = Run(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace gloam
