// host_step_bench: what the host does around one decode step of the engine, with a model and a
// sampler that cost nothing: plan, fill and stage the arrays; take the tokens of the step before,
// sample rows; text, stop rules, deltas and statistics. Microseconds, the median of all steps. A
// GPU works meanwhile, and waits for none of it where a step takes longer than all of it.
//
//   host_step_bench [--batch 1,64,256] [--steps N] [--stop] [--logprobs]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <vector>

#include "CLI/CLI.hpp"
#include "engine/engine_core.h"
#include "engine/metrics.h"
#include "fmt/format.h"
#include "tests/engine/fake_model.h"
#include "tests/engine/null_sink.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kVocabSize = testing::FakeModel::kVocabSize;
constexpr int kPromptTokens = 100;

struct BenchOptions {
  std::vector<int> batches = {1, 64, 256};
  int steps = 400;
  bool stop = false;
  bool logprobs = false;
};

// When a step reached the model and the sampler.
struct StepTimes {
  Clock::time_point forward_begin, forward_end, sample_begin, sample_end;
};

class NullModel final : public Model {
 public:
  explicit NullModel(StepTimes& times) : times_(times) {
    config_.num_layers = 1;
    config_.num_heads = config_.num_kv_heads = 1;
    config_.head_dim = 16;
    config_.vocab_size = kVocabSize;
    config_.max_position = 131072;
  }
  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return 0; }
  Status Reserve(int /*max_tokens*/, int max_logit_rows) override {
    logits_.resize(static_cast<size_t>(max_logit_rows) * kVocabSize);
    return OkStatus();
  }
  LogitRows Forward(const ForwardBatch& batch) override {
    times_.forward_begin = times_.forward_end = Clock::now();
    return {TensorView::Contiguous(logits_.data(), DType::kF32, Device::kCpu,
                                   {batch.num_logit_rows, kVocabSize})};
  }

 private:
  StepTimes& times_;
  ModelConfig config_;
  std::vector<float> logits_;
};

// A GPU that copies what is staged, but neither computes nor waits.
class NullOps final : public testing::FakeOps {
 public:
  explicit NullOps(StepTimes& times) : FakeOps(Device::kCuda), times_(times) {}
  void Repeat(uint64_t /*key*/, const std::function<void()>& step) override { step(); }
  void TakeDrawnTokens(const DrawnTokensParams& /*params*/) override {}
  void Sample(const SampleParams& params) override {
    times_.sample_begin = Clock::now();
    for (size_t i = 0; i < params.rows.size(); ++i) {
      SampleResult& result = params.results[i];
      result.token = static_cast<int32_t>(1 + (++num_drawn_ * 7) % 26);  // letters
      if (params.rows[i].num_logprobs >= 0) result.logprob = {.token = result.token, .rank = 1};
    }
    times_.sample_end = Clock::now();
  }
  void FinishSample() override {}

 private:
  StepTimes& times_;
  uint64_t num_drawn_ = 0;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

Status Measure(int batch, const BenchOptions& options) {
  StepTimes times;
  NullOps ops(times);
  testing::FakeTokenizer tokenizer;
  MetricsRegistry metrics("bench");
  EngineOptions engine;
  engine.max_num_seqs = batch;
  engine.max_num_batched_tokens = std::max(8192, batch);
  const int64_t tokens_per_seq = kPromptTokens + options.steps + 64;
  engine.num_kv_blocks = batch * (tokens_per_seq / kBlockTokens + 2) * 2;
  engine.max_model_len = static_cast<int>(tokens_per_seq);
  GLOAM_ASSIGN_OR_RETURN(
      const auto core,
      EngineCore::Create(engine, ops, std::make_unique<NullModel>(times), tokenizer, metrics));
  for (int i = 0; i < batch; ++i) {
    Request request;
    // Of different lengths, so that blocks fill in different steps.
    request.prompt.assign(kPromptTokens + i % kBlockTokens, 1 + i % 20);
    request.prompt[0] = 1 + i / 20 % 26;
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    if (options.stop) request.sampling.stop = {"zzz", "end of the answer"};
    if (options.logprobs) request.sampling.num_logprobs = 0;
    core->Add(static_cast<RequestHandle>(i + 1), std::move(request),
              std::make_shared<testing::NullSink>(), Clock::now());
  }
  const auto microseconds = [](Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::micro>(to - from).count();
  };
  std::vector<double> before, between, after, total;
  for (int step = 0; step < options.steps; ++step) {
    const auto begin = Clock::now();
    core->Step();
    const auto end = Clock::now();
    if (core->stats().num_waiting > 0 || step < options.steps / 10) continue;  // still in prefill
    before.push_back(microseconds(begin, times.forward_begin));
    between.push_back(microseconds(times.forward_end, times.sample_begin));
    after.push_back(microseconds(times.sample_end, end));
    total.push_back(before.back() + between.back() + after.back());
  }
  if (total.empty()) return Internal("the batch of {} never ran together", batch);
  fmt::print("{:>6} {:>10.1f} {:>10.1f} {:>10.1f} {:>10.1f} {:>12.0f}\n", batch, Median(before),
             Median(between), Median(after), Median(total), 1e3 * Median(total) / batch);
  return OkStatus();
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) {
  gloam::BenchOptions options;
  CLI::App app("Host time around a decode step");
  app.add_option("--batch", options.batches, "sequences that decode together")->delimiter(',');
  app.add_option("--steps", options.steps, "per batch")->check(CLI::Range(50, 100000));
  app.add_flag("--stop", options.stop, "with stop strings");
  app.add_flag("--logprobs", options.logprobs, "with log-probabilities");
  CLI11_PARSE(app, argc, argv);
  fmt::print("{:>6} {:>10} {:>10} {:>10} {:>10} {:>12}\n", "batch", "to model", "to sampler",
             "after", "us in all", "ns a token");
  for (const int batch : options.batches) {
    if (const gloam::Status status = gloam::Measure(batch, options); !status.ok()) {
      fmt::print(stderr, "{}\n", gloam::MessageOf(status));
      return 1;
    }
  }
  return 0;
}
