// forward_bench: tokens per second of the forward pass alone (no server, no sampling), and where
// the time goes. Prefill of 512 tokens, then decode steps at each context and batch size; every
// sequence of a batch has keys and values of its own.
//
//   forward_bench MODEL [--threads N] [--f32] [--contexts 128,7680] [--batches 1,32] [--profile]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "bench/timed_ops.h"
#include "fmt/format.h"
#include "models/model.h"
#include "tests/models/paged_runner.h"

namespace gloam {
namespace {

constexpr int kPrefillTokens = 512;

struct BenchOptions {
  std::string model;
  int threads = 0;
  bool f32 = false;
  bool profile = false;
  int repeats = 3;
  int decode_steps = 16;
  std::vector<int> contexts = {128, 7680};
  std::vector<int> batches = {1, 32};

  DType kv_dtype() const { return f32 ? DType::kF32 : DType::kBF16; }
};

class ForwardBench {
 public:
  ForwardBench(Model& model, TimedOps& ops, const BenchOptions& options)
      : model_(model), ops_(ops), options_(options), random_(1) {
    const int max_batch = *std::max_element(options.batches.begin(), options.batches.end());
    const int max_context = *std::max_element(options.contexts.begin(), options.contexts.end());
    const int positions = std::max(kPrefillTokens, max_context + options.decode_steps * 4);
    const int blocks = max_batch * (positions / kBlockTokens + 2);
    runner_ = std::make_unique<PagedRunner>(model, ops, options.kv_dtype(), blocks, /*seed=*/1);
  }

  // The best of the repeats: other work on the machine only ever adds time.
  void Prefill() {
    double best = 0;
    for (int i = 0; i < options_.repeats; ++i) {
      runner_->Clear();
      ops_.Clear();
      const double seconds = Fill(kPrefillTokens);
      best = std::max(best, kPrefillTokens / seconds);
    }
    fmt::print("prefill of {} tokens: {:.0f} tok/s\n", kPrefillTokens, best);
    Profile();
  }

  void Decode(int context, int batch) {
    runner_->Clear();
    Fill(context);
    for (int i = 1; i < batch; ++i) runner_->Copy(0);
    double best = 0;
    for (int i = 0; i < options_.repeats; ++i) {
      ops_.Clear();
      best = std::max(best, options_.decode_steps * batch / DecodeSteps(batch));
    }
    fmt::print("decode at {} tokens of context, batch {}: {:.1f} tok/s\n", context, batch, best);
    Profile();
  }

 private:
  int32_t RandomToken() {
    return static_cast<int32_t>(random_() % static_cast<uint64_t>(model_.config().vocab_size));
  }

  // A new sequence of `count` random tokens; returns the seconds it took.
  double Fill(int count) {
    const int sequence = runner_->AddSequence();
    const auto begin = std::chrono::steady_clock::now();
    for (int done = 0; done < count;) {
      std::vector<int32_t> tokens(std::min(count - done, kPrefillTokens));
      for (int32_t& token : tokens) token = RandomToken();
      done += static_cast<int>(tokens.size());
      PagedRunner::Chunk chunk = {.sequence = sequence, .tokens = tokens};
      if (done == count) chunk.logit_rows = {static_cast<int>(tokens.size()) - 1};
      runner_->Step(chunk);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  double DecodeSteps(int batch) {
    const auto begin = std::chrono::steady_clock::now();
    for (int step = 0; step < options_.decode_steps; ++step) {
      std::vector<int32_t> tokens(batch);
      std::vector<PagedRunner::Chunk> chunks;
      for (int i = 0; i < batch; ++i) {
        tokens[i] = RandomToken();
        chunks.push_back({.sequence = i, .tokens = {&tokens[i], 1}, .logit_rows = {0}});
      }
      runner_->Step(chunks);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  // Of the last repeat.
  void Profile() {
    if (options_.profile) fmt::print("{}", ops_.Report());
    std::fflush(stdout);
  }

  Model& model_;
  TimedOps& ops_;
  const BenchOptions& options_;
  std::mt19937_64 random_;
  std::unique_ptr<PagedRunner> runner_;
};

int Run(const BenchOptions& options) {
  const auto cpu_ops =
      MakeCpuOps({.num_threads = options.threads,
                  .activations = options.f32 ? CpuActivations::kF32 : CpuActivations::kInt8});
  TimedOps ops(*cpu_ops);
  const auto begin = std::chrono::steady_clock::now();
  const auto loaded = LoadModel(options.model, ops, {});
  if (!loaded.ok()) {
    fmt::print(stderr, "{}\n", MessageOf(loaded.status()));
    return 1;
  }
  const std::chrono::duration<double> load_time = std::chrono::steady_clock::now() - begin;
  Model& model = *loaded->model;
  fmt::print("loaded in {:.2f} s, weights {:.1f} MB\n", load_time.count(),
             static_cast<double>(model.weight_bytes()) / 1e6);
  const int max_batch = *std::max_element(options.batches.begin(), options.batches.end());
  if (const Status status = ReserveSteps(model, ops, options.kv_dtype(),
                                         std::max(kPrefillTokens, max_batch), max_batch);
      !status.ok()) {
    fmt::print(stderr, "{}\n", MessageOf(status));
    return 1;
  }
  ForwardBench bench(model, ops, options);
  bench.Prefill();
  for (const int context : options.contexts) {
    for (const int batch : options.batches) bench.Decode(context, batch);
  }
  return 0;
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) {
  gloam::BenchOptions options;
  CLI::App app("Tokens per second of the forward pass, on random tokens");
  app.add_option("model", options.model, "GGUF file or model folder")->required();
  app.add_option("--threads", options.threads, "0: one per core");
  app.add_flag("--f32", options.f32, "fp32 activations and cache instead of int8 and bf16");
  app.add_flag("--profile", options.profile, "also print the time per operation");
  app.add_option("--repeats", options.repeats, "of which the best counts")
      ->check(CLI::PositiveNumber);
  app.add_option("--decode-steps", options.decode_steps)->check(CLI::PositiveNumber);
  app.add_option("--contexts", options.contexts)->delimiter(',')->check(CLI::PositiveNumber);
  app.add_option("--batches", options.batches)->delimiter(',')->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  return gloam::Run(options);
}
