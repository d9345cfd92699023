// Sampling on the GPU against its CPU twin and against double precision. Tokens must be equal
// unless the draw or a cut lies so close to an edge that the order of fp32 sums may decide; then
// the token must still be one that double precision allows within that error.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/philox.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 13;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Errors relative to the whole mass. The GPU's weights are within 2 ulp and their sums exact; the
// CPU sums 64 weights in fp32.
constexpr double kGpuError = 4e-7;
constexpr double kCpuError = 6e-6;

Ops& Cpu() {
  static const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = 2});
  return *ops;
}

// Rows of logits and what each asks for, with the lists that SampleRow points to.
struct Batch {
  explicit Batch(int64_t vocab_size, int64_t stride = 0)
      : vocab_size(vocab_size), stride(stride == 0 ? vocab_size : stride) {}

  struct Lists {
    std::vector<int32_t> prompt, banned;
    std::vector<std::pair<int32_t, int32_t>> counts;
    std::vector<std::pair<int32_t, float>> bias;
    std::vector<uint32_t> allowed;
  };

  void Add(const std::vector<float>& row_logits, const SampleRow& row,
           std::shared_ptr<Lists> row_lists = nullptr) {
    REQUIRE(static_cast<int64_t>(row_logits.size()) == vocab_size);
    logits.insert(logits.end(), row_logits.begin(), row_logits.end());
    logits.resize(logits.size() + (stride - vocab_size), kNan);
    rows.push_back(row);
    lists.push_back(row_lists);
    if (row_lists == nullptr) return;
    rows.back().prompt_tokens = row_lists->prompt;
    rows.back().banned_tokens = row_lists->banned;
    rows.back().output_counts = row_lists->counts;
    rows.back().logit_bias = row_lists->bias;
    rows.back().allowed = row_lists->allowed.empty() ? nullptr : row_lists->allowed.data();
  }

  int64_t num_rows() const { return static_cast<int64_t>(rows.size()); }
  const float* Row(int64_t row) const { return &logits[row * stride]; }
  TensorView View(float* data, Device device) const {
    TensorView view = TensorView::Contiguous(data, DType::kF32, device, {num_rows(), vocab_size});
    view.strides[0] = stride;
    return view;
  }

  int64_t vocab_size;
  int64_t stride;
  std::vector<float> logits;
  std::vector<SampleRow> rows;
  std::vector<std::shared_ptr<Lists>> lists;
};

struct Gpu {
  Gpu() : backend(MakeSampleBackend(fixture.context)) {}

  // `misalign`: elements by which the logits are off 16 bytes.
  std::vector<SampleResult> Sample(const Batch& batch, int misalign = 0) {
    DeviceArray<float> device(static_cast<int64_t>(batch.logits.size()) + misalign);
    GLOAM_CUDA_CHECK(cudaMemcpy(device.data() + misalign, batch.logits.data(),
                                batch.logits.size() * sizeof(float), cudaMemcpyHostToDevice));
    GLOAM_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<SampleResult> results(batch.rows.size());
    backend->Sample({.logits = batch.View(device.data() + misalign, Device::kCuda),
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
  Cpu().Sample(
      {.logits = batch.View(logits.data(), Device::kCpu), .rows = batch.rows, .results = results});
  return results;
}

std::vector<float> NormalLogits(int64_t vocab_size, std::mt19937& rng, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(vocab_size);
  for (float& logit : logits) logit = normal(rng);
  return logits;
}

// ---- double precision

float Clean(float x) { return std::isnan(x) ? -kInfinity : std::min(x, FLT_MAX); }

// The row's logits after mask, bans, bias and penalties, as sample.h states them.
std::vector<float> Changed(const float* logits, int64_t vocab_size, const SampleRow& row) {
  std::vector<float> x(logits, logits + vocab_size);
  for (int64_t i = 0; i < vocab_size; ++i) {
    if (row.allowed != nullptr && (row.allowed[i / 32] >> (i % 32) & 1) == 0) x[i] = -kInfinity;
  }
  for (const int32_t token : row.banned_tokens) x[token] = -kInfinity;
  for (const auto& [token, bias] : row.logit_bias) x[token] += bias;
  if (row.repetition_penalty != 1.0f) {
    std::vector<bool> seen(vocab_size, false);
    const auto penalise = [&](int32_t token) {
      if (seen[token]) return;
      seen[token] = true;
      x[token] =
          x[token] > 0 ? x[token] / row.repetition_penalty : x[token] * row.repetition_penalty;
    };
    for (const int32_t token : row.prompt_tokens) penalise(token);
    for (const auto& [token, count] : row.output_counts) penalise(token);
  }
  for (const auto& [token, count] : row.output_counts) {
    const float frequency = row.frequency_penalty * static_cast<float>(count);
    const float penalty = frequency + row.presence_penalty;
    if (count > 0) x[token] -= penalty;
  }
  for (float& logit : x) logit = Clean(logit);
  return x;
}

// What double precision says of a drawn token.
struct Verdict {
  double distance = 0;     // of the draw from the token's interval, relative to the mass; 0: inside
  double to_edge = 0;      // of the draw from the nearest edge of its own token's interval
  bool clear_cuts = true;  // no cut within kCpuError of another
  int32_t token = 0;       // where the draw falls
};

class Reference {
 public:
  Reference(const std::vector<float>& logits, const SampleRow& row) {
    const size_t n = logits.size();
    const float max = *std::max_element(logits.begin(), logits.end());
    if (max == -kInfinity) return;
    const float inverse = std::min(1.0f / row.temperature, FLT_MAX);
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    std::vector<double> weights(n);
    for (size_t i = 0; i < n; ++i) {
      weights[i] = logits[i] == -kInfinity ? 0 : std::exp(double{(logits[i] - max) * inverse});
    }
    size_t kept = row.top_k > 0 ? std::min<size_t>(row.top_k, n) : n;
    double total = 0;
    for (size_t i = 0; i < kept; ++i) total += weights[order[i]];
    if (row.top_p < 1.0f) {
      const double need = double{row.top_p} * total;
      double mass = 0;
      size_t fewest = 0, most = 0;  // as the error may make it
      for (size_t i = 0; i < kept && most == 0; ++i) {
        mass += weights[order[i]];
        if (fewest == 0 && mass >= need - kCpuError * total) fewest = i + 1;
        if (mass >= need + kCpuError * total || i + 1 == kept) most = i + 1;
      }
      clear_cuts_ = fewest == most;
      // The mass whose membership is open within the GPU's own error.
      mass = 0;
      size_t least = 0, last = 0;
      for (size_t i = 0; i < kept && last == 0; ++i) {
        mass += weights[order[i]];
        if (least == 0 && mass >= need - kGpuError * total) least = i + 1;
        if (mass >= need + kGpuError * total || i + 1 == kept) last = i + 1;
      }
      for (size_t i = least; i < last; ++i) open_ += weights[order[i]];
      kept = last;
    }
    const double min_weight = row.min_p > 0 ? std::min(double{row.min_p}, 1.0) : 0;
    std::vector<std::pair<int, double>> tokens;
    for (size_t i = 0; i < kept; ++i) {
      const double w = weights[order[i]];
      if (std::abs(w - min_weight) < 1e-6 * min_weight && w < 1) {
        clear_cuts_ = false;
        open_ += w;
      }
      if (w >= min_weight * (1 - 5e-7)) tokens.emplace_back(order[i], w);
    }
    std::sort(tokens.begin(), tokens.end());
    for (const auto& [token, weight] : tokens) {
      if (weight == 0) continue;
      intervals_.push_back({token, total_, total_ + weight});
      total_ += weight;
    }
    uniform_ = cpu::UniformDraw(row.seed, row.draw_index);
  }

  Verdict Judge(int32_t token) const {
    Verdict verdict;
    verdict.clear_cuts = clear_cuts_;
    if (intervals_.empty()) {
      verdict.distance = token == 0 ? 0 : 1;
      verdict.to_edge = 1;
      return verdict;
    }
    const double at = uniform_ * total_;
    verdict.distance = 1;
    for (const Interval& interval : intervals_) {
      if (interval.token == token) {
        verdict.distance =
            std::max({0.0, interval.begin - at - open_, at - interval.end - open_}) / total_;
      }
      if (interval.begin <= at && at < interval.end) {
        verdict.token = interval.token;
        // The ends of all are no edges.
        const double low = interval.begin == 0 ? 1 : (at - interval.begin) / total_;
        const double high = interval.end == total_ ? 1 : (interval.end - at) / total_;
        verdict.to_edge = std::min(low, high);
      }
    }
    return verdict;
  }

 private:
  struct Interval {
    int32_t token;
    double begin, end;
  };
  std::vector<Interval> intervals_;
  double total_ = 0;
  double open_ = 0;
  double uniform_ = 0;
  bool clear_cuts_ = true;
};

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

template <typename T>
T OneOf(std::mt19937& rng, const std::vector<T>& values) {
  return values[rng() % values.size()];
}

// A row of random kind: smooth, with many ties, peaked, flat, or with holes.
std::vector<float> RandomLogits(int64_t vocab_size, std::mt19937& rng) {
  std::vector<float> logits =
      NormalLogits(vocab_size, rng, OneOf<float>(rng, {0.01f, 1, 2, 5, 30}));
  switch (rng() % 6) {
    case 0:
      for (float& x : logits) x = std::round(x * 4) / 4;
      break;
    case 1:
      for (int i = 0; i < 5; ++i) logits[rng() % vocab_size] += 20;
      break;
    case 2:
      for (float& x : logits) {
        if (rng() % 3 == 0) x = -kInfinity;
      }
      break;
    case 3:
      logits[rng() % vocab_size] = OneOf<float>(rng, {kNan, kInfinity, -kInfinity, 1e30f, -0.0f});
      break;
    default:
      break;
  }
  return logits;
}

SampleRow RandomRow(std::mt19937& rng) {
  SampleRow row;
  row.temperature = OneOf<float>(rng, {0, 0.01f, 0.3f, 0.7f, 1, 1, 1.3f, 2, 50, 1e30f, 1e-30f});
  row.top_k = OneOf<int>(rng, {0, 0, 0, 1, 2, 7, 50, 300, 2000, 1 << 20});
  row.top_p = OneOf<float>(rng, {1, 1, 1, 0.99f, 0.95f, 0.9f, 0.5f, 0.1f, 0, 0.9999999f});
  row.min_p = OneOf<float>(rng, {0, 0, 0, 0.001f, 0.05f, 0.5f, 1});
  row.seed = rng() | uint64_t{rng()} << 32;
  row.draw_index = rng() % 3 == 0 ? rng() : rng() % 100;
  row.num_logprobs = OneOf<int>(rng, {-1, -1, -1, 0, 1, 5, 20, 300});
  return row;
}

std::shared_ptr<Batch::Lists> RandomLists(int64_t vocab_size, std::mt19937& rng, SampleRow& row) {
  auto lists = std::make_shared<Batch::Lists>();
  const auto token = [&] { return static_cast<int32_t>(rng() % vocab_size); };
  const auto maybe = [&] { return rng() % 2 == 0; };
  if (maybe()) {
    row.repetition_penalty = OneOf<float>(rng, {1.1f, 0.8f, 2});
    for (size_t i = rng() % 2000; i > 0; --i) lists->prompt.push_back(token());
  }
  if (maybe()) {
    row.frequency_penalty = OneOf<float>(rng, {0, 0.1f, -0.5f, 2});
    row.presence_penalty = OneOf<float>(rng, {0, 0.3f, -1});
  }
  if (maybe()) {
    std::vector<int32_t> tokens;
    for (size_t i = rng() % 300; i > 0; --i) tokens.push_back(token());
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    std::shuffle(tokens.begin(), tokens.end(), rng);
    for (const int32_t t : tokens) lists->counts.emplace_back(t, static_cast<int>(rng() % 9));
  }
  if (maybe()) {
    for (size_t i = rng() % 300; i > 0; --i) {
      lists->bias.emplace_back(token(), OneOf<float>(rng, {-100, -1, 0.5f, 3, 100}));
    }
  }
  if (maybe()) {
    for (size_t i = rng() % 8; i > 0; --i) lists->banned.push_back(token());
  }
  if (maybe()) {
    lists->allowed.assign((vocab_size + 31) / 32, 0);
    switch (rng() % 4) {
      case 0: {  // one token
        const int32_t only = token();
        lists->allowed[only / 32] |= 1u << (only % 32);
        break;
      }
      case 1:  // none
        break;
      default:
        for (uint32_t& word : lists->allowed) word = rng();
    }
  }
  return lists;
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
  for (int trial = 0; trial < 500; ++trial) {
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
  REQUIRE(tally.rows > 3000);
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
      gpu.backend->Sample({.logits = batch.View(device.data(), Device::kCuda),
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
