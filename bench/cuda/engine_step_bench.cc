// engine_step_bench: milliseconds from token to token in the whole engine on the GPU: scheduler,
// step, sampling, stop rules and deltas, without its thread, queue and front ends. Every sequence
// decodes `--steps` tokens after a prompt of its own; prefill is left out.
//
//   engine_step_bench MODEL|random:SHAPE:TYPE [--batch 1,64,256] [--context 128] [--steps 200]
//     [--sampling greedy|top-p|penalties]
//
// With random weights there is no text: the tokens have none.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "engine/engine_core.h"
#include "engine/metrics.h"
#include "fmt/format.h"
#include "tests/engine/fake_model.h"
#include "tests/engine/null_sink.h"
#include "tests/models/named_model.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  std::string model;
  std::vector<int> batches = {1, 64, 256};
  int context = 128;
  int steps = 200;
  std::string sampling = "greedy";
};

SamplingParams SamplingOf(const std::string& name) {
  SamplingParams sampling;
  sampling.ignore_eos = true;
  sampling.seed = 1;
  if (name == "greedy") sampling.temperature = 0;
  if (name == "top-p") sampling.top_p = 0.9f;
  if (name == "penalties") sampling.frequency_penalty = 0.2f;
  return sampling;
}

// Mean milliseconds of a step in which all of `batch` sequences decode.
double Measure(EngineCore& core, int batch, const BenchOptions& options) {
  std::mt19937 random(1);
  for (int i = 0; i < batch; ++i) {
    Request request;
    for (int j = 0; j < options.context; ++j) {
      request.prompt.push_back(
          static_cast<int32_t>(random() % static_cast<unsigned>(core.model_config().vocab_size)));
    }
    request.sampling = SamplingOf(options.sampling);
    core.Add(static_cast<RequestHandle>(i + 1), std::move(request),
             std::make_shared<testing::NullSink>(), Clock::now());
  }
  while (core.stats().num_waiting > 0) core.Step();
  // Until all decode, and the step is recorded.
  for (int i = 0; i < 16; ++i) core.Step();
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < options.steps; ++i) core.Step();
  const std::chrono::duration<double, std::milli> elapsed = Clock::now() - begin;
  core.EndAll(FinishReason::kCancelled, OkStatus());
  while (core.HasWork()) core.Step();
  return elapsed.count() / options.steps;
}

Status Run(const BenchOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<Ops> ops, MakeCudaOps({}));
  GLOAM_ASSIGN_OR_RETURN(const NamedModel named, FindNamedModel(options.model));
  GLOAM_ASSIGN_OR_RETURN(LoadedModel loaded, LoadNamedModel(named, *ops));
  if (loaded.tokenizer == nullptr) loaded.tokenizer = std::make_unique<testing::FakeTokenizer>();
  MetricsRegistry metrics("bench");
  EngineOptions engine;
  engine.max_num_seqs = *std::max_element(options.batches.begin(), options.batches.end());
  engine.max_num_batched_tokens = std::max(8192, engine.max_num_seqs);
  engine.max_model_len = options.context + options.steps + 4096;
  engine.kv_cache_bytes = 0;  // what is free
  engine.enable_prefix_caching = false;
  GLOAM_ASSIGN_OR_RETURN(const auto core, EngineCore::Create(engine, *ops, std::move(loaded.model),
                                                             *loaded.tokenizer, metrics));
  for (const int batch : options.batches) {
    fmt::print(R"({{"model": "{}", "sampling": "{}", "batch": {}, "context": {}, "ms": {:.4f}}})"
               "\n",
               options.model, options.sampling, batch, options.context,
               Measure(*core, batch, options));
    std::fflush(stdout);
  }
  return OkStatus();
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) {
  gloam::BenchOptions options;
  CLI::App app("Time from token to token in the engine");
  app.add_option("model", options.model, "file, folder or random:SHAPE:TYPE")->required();
  app.add_option("--batch", options.batches, "sequences that decode together")->delimiter(',');
  app.add_option("--context", options.context, "tokens of a prompt");
  app.add_option("--steps", options.steps, "per batch");
  app.add_option("--sampling", options.sampling)
      ->check(CLI::IsMember({"greedy", "top-p", "penalties"}));
  CLI11_PARSE(app, argc, argv);
  if (const gloam::Status status = gloam::Run(options); !status.ok()) {
    fmt::print(stderr, "{}\n", gloam::MessageOf(status));
    return 1;
  }
  return 0;
}
