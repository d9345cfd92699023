// Sampling on the GPU against its CPU twin and against double precision. Tokens must be equal
// unless the draw or a cut lies so close to an edge that the order of fp32 sums may decide; then
// the token must still be one that double precision allows within that error.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/sample_reference.h"
#include "tests/kernels/cuda/sample_rows.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 13;

Ops& Cpu() {
  static const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = 2});
  return *ops;
}

struct Gpu {
  Gpu() : backend(MakeSampleBackend(fixture.context)) {}

  // `misalign`: elements by which the logits are off 16 bytes.
  std::vector<SampleResult> Sample(const Batch& batch, int misalign = 0) {
    DeviceArray<float> device(static_cast<int64_t>(batch.logits.size()) + misalign);
    GLOAM_CUDA_CHECK(cudaMemcpy(device.data() + misalign, batch.logits.data(),
                                batch.logits.size() * sizeof(float), cudaMemcpyHostToDevice));
    GLOAM_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<SampleResult> results(batch.rows.size());
    backend->Sample({.logits = {batch.View(device.data() + misalign, Device::kCuda)},
                     .rows = batch.rows,
                     .results = results});
    // The next step's input, enqueued before the host knows it: the rows in reverse, and between
    // them tokens that it knows.
    const auto num_rows = static_cast<int>(results.size());
    std::vector<int32_t> input;
    for (int row = num_rows - 1; row >= 0; --row) {
      input.push_back(DrawnToken(row));
      input.push_back(row + 1000);
    }
    const DeviceArray<int32_t> token_ids(input);
    TakeDrawnTokens({.token_ids = token_ids.data(), .num_tokens = 2 * num_rows},
                    backend->device_tokens(), fixture.context);
    backend->FinishSample();
    const std::vector<int32_t> tokens = token_ids.Download();
    for (int row = 0; row < num_rows; ++row) {
      const size_t at = 2 * static_cast<size_t>(num_rows - 1 - row);
      REQUIRE(tokens[at] == results[row].token);
      REQUIRE(tokens[at + 1] == row + 1000);
    }
    return results;
  }

  CudaFixture fixture;
  std::unique_ptr<SampleBackend> backend;
};

std::vector<SampleResult> SampleOnCpu(const Batch& batch) {
  std::vector<float> logits = batch.logits;
  std::vector<SampleResult> results(batch.rows.size());
  Cpu().Sample({.logits = {batch.View(logits.data(), Device::kCpu)},
                .rows = batch.rows,
                .results = results});
  return results;
}

void CheckLogprobs(const SampleResult& gpu, const SampleResult& cpu) {
  const auto close = [](float a, float b) {
    return a == b || std::abs(a - b) <= 2e-6 + 1e-6 * std::abs(b);
  };
  REQUIRE(gpu.logprob.token == cpu.logprob.token);
  REQUIRE(gpu.logprob.rank == cpu.logprob.rank);
  CAPTURE(gpu.logprob.logprob, cpu.logprob.logprob);
  REQUIRE(close(gpu.logprob.logprob, cpu.logprob.logprob));
  REQUIRE(gpu.top.size() == cpu.top.size());
  int wrong = 0;
  for (size_t i = 0; i < gpu.top.size(); ++i) {
    wrong += gpu.top[i].token != cpu.top[i].token || gpu.top[i].rank != cpu.top[i].rank ||
                     !close(gpu.top[i].logprob, cpu.top[i].logprob)
                 ? 1
                 : 0;
  }
  REQUIRE(wrong == 0);
}

struct Tally {
  int rows = 0;
  int decided = 0;  // clear of every edge: must be equal
  int unequal = 0;
};

// Samples on both and compares row by row.
void CheckBatch(Gpu& gpu, const Batch& batch, Tally& tally, int misalign = 0) {
  const std::vector<SampleResult> got = gpu.Sample(batch, misalign);
  const std::vector<SampleResult> twin = SampleOnCpu(batch);
  for (int64_t i = 0; i < batch.num_rows(); ++i) {
    const SampleRow& row = batch.rows[i];
    CAPTURE(i, batch.vocab_size, row.temperature, row.top_k, row.top_p, row.min_p, row.seed,
            row.draw_index, row.num_logprobs, got[i].token, twin[i].token);
    REQUIRE((got[i].token >= 0 && got[i].token < batch.vocab_size));
    ++tally.rows;
    if (!(row.temperature > 0)) {
      ++tally.decided;
      REQUIRE(got[i].token == twin[i].token);
    } else {
      const Reference reference(Changed(batch.Row(i), batch.vocab_size, row), row);
      const Verdict verdict = reference.Judge(got[i].token);
      CAPTURE(verdict.distance, verdict.to_edge, verdict.token);
      REQUIRE(verdict.distance <= kGpuError);
      if (verdict.clear_cuts && verdict.to_edge > kCpuError) {
        ++tally.decided;
        REQUIRE(got[i].token == twin[i].token);
        REQUIRE(got[i].token == verdict.token);
      }
      tally.unequal += got[i].token != twin[i].token ? 1 : 0;
    }
    if (row.num_logprobs < 0) {
      REQUIRE(got[i].top.empty());
    } else if (got[i].token == twin[i].token) {
      CheckLogprobs(got[i], twin[i]);
    }
  }
}

}  // namespace

TEST_CASE("plain greedy rows give the CPU's tokens: ties, NaN, infinities, any alignment") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  SampleRow greedy;
  greedy.temperature = 0;
  Tally tally;
  for (const int64_t vocab_size :
       {1, 2, 3, 31, 128, 129, 1000, 4099, 49152, 128256, 151936, 262144}) {
    for (const int num_rows : {1, 2, 5, 40}) {
      if (vocab_size * num_rows > 6'000'000) continue;
      for (const int64_t padding : {0, 4, 3}) {
        Batch batch(vocab_size, vocab_size + padding);
        for (int i = 0; i < num_rows; ++i) {
          std::vector<float> logits = RandomLogits(vocab_size, rng);
          if (i % 4 == 1) std::fill(logits.begin(), logits.end(), -kInfinity);
          if (i % 4 == 2) std::fill(logits.begin(), logits.end(), 1.5f);
          if (i % 4 == 3) logits[vocab_size - 1] = 1e9f;
          batch.Add(logits, greedy);
        }
        CheckBatch(gpu, batch, tally, static_cast<int>(padding % 4 == 3 ? 1 : 0));
      }
    }
  }
}

TEST_CASE("random rows with every combination of parameters draw the CPU's tokens") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  Tally tally;
  for (int trial = 0; trial < Sized(500, 25); ++trial) {
    CAPTURE(trial);
    const int64_t vocab_size =
        trial % 25 == 24 ? OneOf<int>(rng, {128256, 151936, 262144})
                         : OneOf<int>(rng, {1, 2, 5, 127, 128, 129, 640, 1000, 4099, 32003});
    const int num_rows =
        vocab_size > 100000 ? 1 + static_cast<int>(rng() % 4) : 1 + static_cast<int>(rng() % 16);
    Batch batch(vocab_size, vocab_size + OneOf<int>(rng, {0, 0, 1, 4}));
    for (int i = 0; i < num_rows; ++i) {
      SampleRow row = RandomRow(rng);
      const std::shared_ptr<Batch::Lists> lists =
          rng() % 2 == 0 ? RandomLists(vocab_size, rng, row) : nullptr;
      batch.Add(RandomLogits(vocab_size, rng), row, lists);
    }
    CheckBatch(gpu, batch, tally);
  }
  WARN(tally.rows << " rows, " << tally.decided << " clear of every edge, " << tally.unequal
                  << " unequal to the CPU's");
  REQUIRE(tally.rows > Sized(3000, 100));
  REQUIRE(tally.decided > tally.rows * 8 / 10);
}

TEST_CASE("many draws of one distribution equal the CPU's") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  Tally tally;
  const std::vector<float> small = NormalLogits(40, rng, 1.5f);
  std::vector<float> ties = NormalLogits(700, rng, 2);
  for (float& x : ties) x = std::round(x * 2) / 2;
  for (const auto& [top_k, top_p, min_p] : std::vector<std::tuple<int, float, float>>{
           {0, 1, 0}, {3, 1, 0}, {0, 0.8f, 0}, {0, 1, 0.2f}, {20, 0.7f, 0.01f}, {400, 0.999f, 0}}) {
    for (const std::vector<float>& logits : {small, ties}) {
      Batch batch(static_cast<int64_t>(logits.size()));
      SampleRow row;
      row.seed = 77;
      row.top_k = top_k;
      row.top_p = top_p;
      row.min_p = min_p;
      for (int i = 0; i < 300; ++i) {
        row.draw_index = i;
        batch.Add(logits, row);
      }
      CheckBatch(gpu, batch, tally);
    }
  }
  REQUIRE(tally.decided > tally.rows * 95 / 100);
}

TEST_CASE("ties at the cut of top_k and top_p are kept lowest id first") {
  Gpu gpu;
  const auto drawn = [&](const std::vector<float>& logits, SampleRow row) {
    Batch batch(static_cast<int64_t>(logits.size()));
    for (int i = 0; i < 200; ++i) {
      row.draw_index = i;
      batch.Add(logits, row);
    }
    std::vector<int32_t> tokens;
    for (const SampleResult& result : gpu.Sample(batch)) tokens.push_back(result.token);
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    return tokens;
  };
  SampleRow row;
  row.temperature = 10;
  row.top_k = 3;
  REQUIRE(drawn({1, 3, 2, 3, 2, 2, 0, -5}, row) == std::vector<int32_t>{1, 2, 3});
  // Equal logits over several chunks: ids 0 .. 4 are kept.
  row.top_k = 5;
  REQUIRE(drawn(std::vector<float>(1000, 0.5f), row) == std::vector<int32_t>{0, 1, 2, 3, 4});
  row.top_k = 0;
  row.top_p = 0.0047f;  // 4.7 of 1000
  REQUIRE(drawn(std::vector<float>(1000, 0.5f), row) == std::vector<int32_t>{0, 1, 2, 3, 4});
  std::vector<float> sparse(1000, -1.0f);
  for (const int i : {3, 130, 400, 999}) sparse[i] = 2;
  row.top_p = 1;
  row.top_k = 3;
  REQUIRE(drawn(sparse, row) == std::vector<int32_t>{3, 130, 400});
}

TEST_CASE("a row's result does not depend on its batch") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  constexpr int64_t kVocab = 50257;
  Batch batch(kVocab);
  for (int i = 0; i < 48; ++i) {
    SampleRow row = RandomRow(rng);
    const auto lists = i % 3 == 0 ? RandomLists(kVocab, rng, row) : nullptr;
    batch.Add(RandomLogits(kVocab, rng), row, lists);
  }
  const std::vector<SampleResult> together = gpu.Sample(batch);
  for (int64_t i = 0; i < batch.num_rows(); ++i) {
    Batch one(kVocab);
    one.Add(std::vector<float>(batch.Row(i), batch.Row(i) + kVocab), batch.rows[i], batch.lists[i]);
    const SampleResult alone = gpu.Sample(one)[0];
    REQUIRE(alone.token == together[i].token);
    REQUIRE(alone.logprob.logprob == together[i].logprob.logprob);
    REQUIRE(alone.logprob.rank == together[i].logprob.rank);
    REQUIRE(alone.top.size() == together[i].top.size());
  }
}

TEST_CASE("lists longer than what was reserved") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  constexpr int64_t kVocab = 5000;
  REQUIRE(gpu.backend->Reserve({.max_logit_rows = 2, .vocab_size = kVocab}).ok());
  Tally tally;
  for (const int prompt_tokens : {10, 500'000, 100}) {
    Batch batch(kVocab);
    for (int i = 0; i < 5; ++i) {
      SampleRow row;
      row.seed = i;
      row.repetition_penalty = 1.3f;
      row.num_logprobs = 4000;
      auto lists = std::make_shared<Batch::Lists>();
      for (int t = 0; t < prompt_tokens; ++t) {
        lists->prompt.push_back(static_cast<int32_t>(rng() % kVocab));
      }
      batch.Add(NormalLogits(kVocab, rng, 2), row, lists);
    }
    CheckBatch(gpu, batch, tally);
  }
}

TEST_CASE("a Sample that nobody finishes gives way to what is called next") {
  std::mt19937 rng(kSeed);
  Gpu gpu;
  for (const float temperature : {0.0f, 1.0f}) {
    Batch batch(32000);
    for (int i = 0; i < 9; ++i) {
      batch.Add(NormalLogits(32000, rng, 2), {.temperature = temperature, .seed = 5});
    }
    const std::vector<SampleResult> expected = gpu.Sample(batch);
    for (int i = 0; i < 3; ++i) {
      const DeviceArray<float> device(batch.logits);
      std::vector<SampleResult> dropped(batch.rows.size());
      gpu.backend->Sample({.logits = {batch.View(device.data(), Device::kCuda)},
                           .rows = batch.rows,
                           .results = dropped});
      const std::vector<SampleResult> got = gpu.Sample(batch);
      for (size_t row = 0; row < got.size(); ++row) REQUIRE(got[row].token == expected[row].token);
    }
  }
}

TEST_CASE("Score gives the CPU's log-probabilities and ranks") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  Gpu gpu;
  for (const int64_t vocab_size : {1, 100, 129, 4099, 128256}) {
    for (const int num_rows : {1, 7, 60}) {
      if (vocab_size * num_rows > 2'000'000) continue;
      for (const int num_logprobs : {0, 1, 20}) {
        CAPTURE(vocab_size, num_rows, num_logprobs);
        Batch batch(vocab_size);
        std::vector<int32_t> tokens;
        for (int i = 0; i < num_rows; ++i) {
          batch.Add(RandomLogits(vocab_size, rng), {});
          tokens.push_back(static_cast<int32_t>(rng() % vocab_size));
        }
        std::vector<SampleResult> got(num_rows), twin(num_rows);
        const DeviceArray<float> device(batch.logits);
        std::vector<float> logits = batch.logits;
        gpu.backend->Score({.logits = batch.View(device.data(), Device::kCuda),
                            .tokens = tokens,
                            .num_logprobs = num_logprobs,
                            .results = got});
        Cpu().Score({.logits = batch.View(logits.data(), Device::kCpu),
                     .tokens = tokens,
                     .num_logprobs = num_logprobs,
                     .results = twin});
        for (int i = 0; i < num_rows; ++i) {
          REQUIRE(got[i].token == tokens[i]);
          CheckLogprobs(got[i], twin[i]);
        }
      }
    }
  }
}

}  // namespace gloam::cuda
