// Sampling: the kept set of every filter on crafted rows, the drawn distribution, log-probabilities
// against double precision, and rows that try to break it.
#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/philox.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

ThreadPool& Pool() {
  static ThreadPool pool(2);
  return pool;
}

SampleResult SampleLogits(std::vector<float> logits, const SampleRow& row) {
  SampleResult result;
  SampleParams params;
  params.logits.values = TensorView::Contiguous(logits.data(), DType::kF32, Device::kCpu,
                                                {1, static_cast<int64_t>(logits.size())});
  params.rows = {&row, 1};
  params.results = {&result, 1};
  Sample(params, Pool());
  return result;
}

// `count` draws with indices 0, 1, ...: how often each token came.
std::map<int32_t, int> Histogram(const std::vector<float>& logits, SampleRow row, int count) {
  std::map<int32_t, int> histogram;
  for (int i = 0; i < count; ++i) {
    row.draw_index = i;
    ++histogram[SampleLogits(logits, row).token];
  }
  return histogram;
}

std::set<int32_t> Drawn(const std::vector<float>& logits, const SampleRow& row, int count = 400) {
  std::set<int32_t> tokens;
  for (const auto& [token, times] : Histogram(logits, row, count)) tokens.insert(token);
  return tokens;
}

std::vector<float> NormalLogits(size_t vocab_size, std::mt19937& rng, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(vocab_size);
  for (float& logit : logits) logit = normal(rng);
  return logits;
}

// The distribution that the contract states, by sorting, in double precision. Probabilities of all
// tokens; zero for those filtered out.
std::vector<double> Reference(const std::vector<float>& logits, const SampleRow& row) {
  const size_t n = logits.size();
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> p(n, 0.0);
  size_t kept = row.top_k > 0 ? std::min<size_t>(row.top_k, n) : n;
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    total += p[order[i]] =
        std::exp((double{logits[order[i]]} - logits[order[0]]) / double{row.temperature});
  }
  if (row.top_p < 1) {
    double mass = 0;
    for (size_t i = 0; i < kept; ++i) {
      if (i > 0 && mass >= double{row.top_p} * total) p[order[i]] = 0;
      mass += p[order[i]];
    }
  }
  for (double& x : p) {
    if (x < double{row.min_p}) x = 0;
  }
  total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return p;
}

// Pearson's statistic over cells expected at least 5 times (the rest pooled), against its mean plus
// 5 standard deviations: mean df, variance 2 df.
void CheckDistribution(const std::vector<float>& logits, const SampleRow& row, int count) {
  const std::vector<double> p = Reference(logits, row);
  const std::map<int32_t, int> seen = Histogram(logits, row, count);
  double statistic = 0, rest_expected = 0;
  int cells = 0, rest_seen = 0;
  for (size_t token = 0; token < p.size(); ++token) {
    const auto it = seen.find(static_cast<int32_t>(token));
    const int times = it == seen.end() ? 0 : it->second;
    if (p[token] == 0) {
      INFO("token " << token << " must not be drawn");
      REQUIRE(times == 0);
      continue;
    }
    const double expected = p[token] * count;
    if (expected < 5) {
      rest_expected += expected;
      rest_seen += times;
      continue;
    }
    statistic += (times - expected) * (times - expected) / expected;
    ++cells;
  }
  if (rest_expected >= 5) {
    statistic += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
    ++cells;
  }
  const double df = std::max(1, cells - 1);
  CAPTURE(statistic, df);
  REQUIRE(statistic < df + 5 * std::sqrt(2 * df));
}

}  // namespace

TEST_CASE("Philox gives the published test vectors") {
  // Known answers of Random123's kat_vectors for philox4x32-10.
  REQUIRE(Philox4x32({0, 0, 0, 0}, {0, 0}) ==
          std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  REQUIRE(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
          std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("greedy takes the largest logit, the lowest id among equals") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  SampleRow greedy;
  greedy.temperature = 0;
  ForEachSimdTarget([&] {
    for (const int n : {1, 2, 15, 16, 17, 64, 65, 1000, 49152}) {
      std::vector<float> logits = NormalLogits(n, rng, 1);
      REQUIRE(SampleLogits(logits, greedy).token ==
              std::max_element(logits.begin(), logits.end()) - logits.begin());
      const int a = static_cast<int>(rng() % n), b = static_cast<int>(rng() % n);
      logits[a] = logits[b] = 100;
      REQUIRE(SampleLogits(logits, greedy).token == std::min(a, b));
      std::fill(logits.begin(), logits.end(), 2.5f);
      REQUIRE(SampleLogits(logits, greedy).token == 0);
      logits[0] = kNan;
      REQUIRE(SampleLogits(logits, greedy).token == (n > 1 ? 1 : 0));
      std::fill(logits.begin(), logits.end(), -kInfinity);
      logits[n - 1] = -1e30f;
      REQUIRE(SampleLogits(logits, greedy).token == n - 1);
    }
  });
}

TEST_CASE("top_k keeps exactly k, ties lowest id first") {
  const std::vector<float> logits = {1, 3, 2, 3, 2, 2, 0, -5};
  SampleRow row;
  row.temperature = 10;
  row.top_k = 1;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{1});
  row.top_k = 3;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{1, 2, 3});
  row.top_k = 4;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{1, 2, 3, 4});
  row.top_k = 8;
  REQUIRE(Drawn(logits, row, 2000).size() == 8);
  row.top_k = 1000;
  REQUIRE(Drawn(logits, row, 2000).size() == 8);
}

TEST_CASE("top_p keeps the smallest set that reaches the mass") {
  // Probabilities 1/2, 1/4, 1/8, 1/16, 1/16 at ids 3, 0, 4, 1, 2.
  const float l = std::log(2.0f);
  const std::vector<float> logits = {-2 * l, -4 * l, -4 * l, -l, -3 * l};
  SampleRow row;
  for (const auto& [top_p, kept] : std::vector<std::pair<float, std::set<int32_t>>>{
           {0.0f, {3}},
           {0.49f, {3}},
           {0.51f, {3, 0}},
           {0.74f, {3, 0}},
           {0.76f, {3, 0, 4}},
           {0.9f, {3, 0, 4, 1}},  // of the two equals the lower id
           {0.95f, {3, 0, 4, 1, 2}},
           {1.0f, {3, 0, 4, 1, 2}}}) {
    CAPTURE(top_p);
    row.top_p = top_p;
    REQUIRE(Drawn(logits, row) == kept);
  }
  // After top_k, mass is relative to what top_k kept: 4/7, 2/7, 1/7.
  row.top_k = 3;
  row.top_p = 0.8f;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{3, 0});
  row.top_p = 0.9f;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{3, 0, 4});
}

TEST_CASE("min_p keeps what is likely enough beside the most likely") {
  const float l = std::log(2.0f);
  const std::vector<float> logits = {-2 * l, -4 * l, -4 * l, -l, -3 * l};
  SampleRow row;
  row.min_p = 0.2f;  // relative probabilities 1/2, 1/8, 1/8, 1, 1/4
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{0, 3, 4});
  row.min_p = 0.3f;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{0, 3});
  row.min_p = 1.0f;
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{3});
  row.min_p = 0.2f;
  row.temperature = 0.5f;  // squares them: 1/4, 1/64, 1/64, 1, 1/16
  REQUIRE(Drawn(logits, row) == std::set<int32_t>{0, 3});
}

TEST_CASE("penalties, bias, bans and masks") {
  SampleRow greedy;
  greedy.temperature = 0;
  greedy.num_logprobs = 1;

  SECTION("repetition divides positive and multiplies negative logits, once per token") {
    const std::vector<float> logits = {4, 3.5f, -1, -1.5f};
    const std::vector<int32_t> prompt = {0, 0, 0, 0};
    greedy.repetition_penalty = 1.1f;
    greedy.prompt_tokens = prompt;
    REQUIRE(SampleLogits(logits, greedy).token == 0);  // 4 / 1.1 = 3.64; four times would be 2.7
    greedy.repetition_penalty = 1.2f;
    REQUIRE(SampleLogits(logits, greedy).token == 1);
    const std::vector<float> negative = {-9, -9, -1, -1.5f};
    const std::vector<std::pair<int32_t, int32_t>> counts = {{2, 5}};
    greedy.prompt_tokens = {};
    greedy.output_counts = counts;
    greedy.repetition_penalty = 1.4f;
    REQUIRE(SampleLogits(negative, greedy).token == 2);
    greedy.repetition_penalty = 1.6f;
    REQUIRE(SampleLogits(negative, greedy).token == 3);
  }
  SECTION("frequency counts, presence does not; the prompt does not matter") {
    const std::vector<float> logits = {4, 3, 2};
    const std::vector<std::pair<int32_t, int32_t>> counts = {{0, 3}};
    const std::vector<int32_t> prompt = {1, 1, 1};
    greedy.prompt_tokens = prompt;
    greedy.output_counts = counts;
    greedy.frequency_penalty = 0.3f;
    REQUIRE(SampleLogits(logits, greedy).token == 0);
    greedy.frequency_penalty = 0.4f;
    REQUIRE(SampleLogits(logits, greedy).token == 1);
    greedy.frequency_penalty = 0;
    greedy.presence_penalty = 0.9f;
    REQUIRE(SampleLogits(logits, greedy).token == 0);
    greedy.presence_penalty = 1.1f;
    REQUIRE(SampleLogits(logits, greedy).token == 1);
  }
  SECTION("bias comes before the repetition penalty") {
    const std::vector<float> logits = {-1, 0.9f};
    const std::vector<std::pair<int32_t, float>> bias = {{0, 3.0f}};
    const std::vector<std::pair<int32_t, int32_t>> counts = {{0, 1}};
    greedy.logit_bias = bias;
    greedy.output_counts = counts;
    greedy.repetition_penalty = 2;  // (-1 + 3) / 2 = 1; the other order gives -2 + 3 = 1 as well
    REQUIRE(SampleLogits(logits, greedy).token == 0);
    greedy.repetition_penalty = 4;  // 0.5, against -4 + 3 = -1
    REQUIRE(SampleLogits({-1, 0.4f}, greedy).token == 0);
  }
  SECTION("banned and masked tokens are never drawn; log-probabilities stay the model's") {
    const std::vector<float> logits = {1, 2, 3, 4};
    const std::vector<int32_t> banned = {3};
    const uint32_t allowed = 0b1010;
    const std::vector<std::pair<int32_t, float>> bias = {{3, 100.0f}, {0, 100.0f}};
    greedy.banned_tokens = banned;
    greedy.allowed = &allowed;
    greedy.logit_bias = bias;
    const SampleResult result = SampleLogits(logits, greedy);
    REQUIRE(result.token == 1);
    REQUIRE(result.logprob.rank == 3);
    const double log_sum = std::log(std::exp(1.0) + std::exp(2.0) + std::exp(3.0) + std::exp(4.0));
    REQUIRE(result.logprob.logprob == Approx(2 - log_sum).epsilon(1e-6));
    REQUIRE(result.top.size() == 1);
    REQUIRE(result.top[0].token == 3);
    REQUIRE(result.top[0].logprob == Approx(4 - log_sum).epsilon(1e-6));
    greedy.temperature = 5;
    REQUIRE(Drawn(logits, greedy) == std::set<int32_t>{1});
  }
}

TEST_CASE("draws follow the stated distribution") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const std::vector<float> small = NormalLogits(40, rng, 1.5f);
  const std::vector<float> large = NormalLogits(3000, rng, 3);
  SampleRow row;
  row.seed = 1234;
  const auto check = [&](float temperature, int top_k, float top_p, float min_p) {
    CAPTURE(temperature, top_k, top_p, min_p);
    row.temperature = temperature;
    row.top_k = top_k;
    row.top_p = top_p;
    row.min_p = min_p;
    CheckDistribution(small, row, 20000);
    CheckDistribution(large, row, 8000);
  };
  check(1, 0, 1, 0);
  check(0.7f, 0, 1, 0);
  check(2, 0, 1, 0);
  check(1, 10, 1, 0);
  check(1, 200, 1, 0);  // more than the chunks of the large row
  check(1, 0, 0.8f, 0);
  check(3, 0, 0.99f, 0);
  check(1, 0, 1, 0.05f);
  check(1.3f, 50, 0.9f, 0.02f);
  check(0.01f, 0, 0.999f, 0);
}

TEST_CASE("filters keep the same tokens as a full sort on random rows") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  for (int trial = 0; trial < 300; ++trial) {
    CAPTURE(trial);
    std::vector<float> logits = NormalLogits(1 + rng() % 700, rng, 2);
    for (float& logit : logits) logit = std::round(logit * 4) / 4;  // many ties
    SampleRow row;
    row.temperature = 1.0f + static_cast<float>(rng() % 3);
    row.top_k = static_cast<int>(rng() % 3 == 0 ? 0 : rng() % 40);
    row.top_p = rng() % 3 == 0 ? 1.0f : static_cast<float>(rng() % 97 + 1) / 101;
    row.min_p = rng() % 3 == 0 ? static_cast<float>(rng() % 50) / 101 : 0.0f;
    row.seed = rng();
    const std::vector<double> p = Reference(logits, row);
    for (const int32_t token : Drawn(logits, row, 60)) REQUIRE(p[token] > 0);
  }
}

TEST_CASE("a draw depends on seed and index alone") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  constexpr int kRows = 40, kVocab = 2000;
  std::vector<float> logits = NormalLogits(kRows * kVocab, rng, 2);
  std::vector<SampleRow> rows(kRows);
  for (int i = 0; i < kRows; ++i) {
    rows[i].seed = i / 2;
    rows[i].draw_index = i % 2;
    rows[i].top_p = i % 3 == 0 ? 0.9f : 1.0f;
    rows[i].top_k = i % 5 == 0 ? 20 : 0;
    rows[i].num_logprobs = i % 4 - 1;
  }
  std::vector<std::vector<float>> single(kRows);
  for (int i = 0; i < kRows; ++i) {
    single[i].assign(&logits[i * kVocab], &logits[i * kVocab] + kVocab);
  }
  std::vector<SampleResult> results(kRows);
  SampleParams params;
  params.logits.values =
      TensorView::Contiguous(logits.data(), DType::kF32, Device::kCpu, {kRows, kVocab});
  params.rows = rows;
  params.results = results;
  ThreadPool three(3);
  Sample(params, three);
  std::set<int32_t> distinct;
  for (int i = 0; i < kRows; ++i) {
    const SampleResult alone = SampleLogits(single[i], rows[i]);
    REQUIRE(alone.token == results[i].token);
    REQUIRE(alone.logprob.logprob == results[i].logprob.logprob);
    REQUIRE(alone.logprob.rank == results[i].logprob.rank);
    REQUIRE(alone.top.size() == results[i].top.size());
    distinct.insert(alone.token);
  }
  REQUIRE(distinct.size() > 10);
}

TEST_CASE("adversarial rows") {
  SampleRow row;
  row.seed = 99;
  std::vector<SampleRow> kinds(5, row);
  kinds[1].top_p = 0.9f;
  kinds[2].top_k = 7;
  kinds[3].min_p = 0.1f;
  kinds[4].top_p = 0.5f;
  kinds[4].top_k = 3;
  kinds[4].min_p = 0.2f;
  for (SampleRow& kind : kinds) {
    kind.num_logprobs = 3;
    for (const int n : {1, 63, 64, 65, 5000}) {
      CAPTURE(n, kind.top_p, kind.top_k, kind.min_p);
      const auto token_of = [&](const std::vector<float>& logits) {
        const SampleResult result = SampleLogits(logits, kind);
        REQUIRE((result.token >= 0 && result.token < n));
        REQUIRE(result.top.size() == static_cast<size_t>(std::min(n, 3)));
        return result.token;
      };
      std::vector<float> logits(n, 1.0f);
      token_of(logits);  // all equal
      for (const float spike : {1e4f, 3e38f, kInfinity}) {
        logits.assign(n, -2.0f);
        logits[n / 2] = spike;
        REQUIRE(token_of(logits) == n / 2);
      }
      logits.assign(n, -kInfinity);
      logits[n - 1] = 0;
      REQUIRE(token_of(logits) == n - 1);
      logits.assign(n, kNan);
      logits[n / 3] = -5;
      REQUIRE(token_of(logits) == n / 3);
      logits.assign(n, kNan);
      token_of(logits);
      logits.assign(n, -kInfinity);
      token_of(logits);
      logits.assign(n, -3e38f);
      logits[0] = 3e38f;
      REQUIRE(token_of(logits) == 0);
    }
  }
  // Temperatures at the ends of fp32.
  row.temperature = 1e-40f;
  REQUIRE(SampleLogits({1, 2, 1.999f}, row).token == 1);
  row.temperature = 1e30f;
  REQUIRE(Drawn({1, 2, 3, 4}, row).size() == 4);
  row.top_p = 0.6f;
  REQUIRE(Drawn({1, 2, 3, 4}, row) == std::set<int32_t>{1, 2, 3});
}

TEST_CASE("log-probabilities are the log-softmax of the logits as they came") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  for (const int n : {1, 10, 100, 49152, 151936}) {
    CAPTURE(n);
    std::vector<float> logits = NormalLogits(n, rng, 4);
    for (float& logit : logits) logit += 20;
    if (n > 20) logits[7] = logits[13] = logits[2] = 60;  // ties at the top
    double sum = 0;
    for (const float logit : logits) sum += std::exp(double{logit});
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    const std::vector<int32_t> tokens = {0, static_cast<int32_t>(n / 2), order[n / 3]};
    std::vector<float> rows;
    for (int i = 0; i < 3; ++i) rows.insert(rows.end(), logits.begin(), logits.end());
    std::vector<SampleResult> results(3);
    ScoreParams params;
    params.logits = TensorView::Contiguous(rows.data(), DType::kF32, Device::kCpu, {3, n});
    params.tokens = tokens;
    params.results = results;
    for (const int num_logprobs : {0, 1, 5, 20, 3000}) {
      params.num_logprobs = num_logprobs;
      Score(params, Pool());
      for (int i = 0; i < 3; ++i) {
        const SampleResult& result = results[i];
        const float logit = logits[tokens[i]];
        REQUIRE(result.token == tokens[i]);
        REQUIRE(result.logprob.token == tokens[i]);
        REQUIRE(result.logprob.logprob ==
                Approx(double{logit} - std::log(sum)).epsilon(1e-6).margin(2e-6));
        const auto larger =
            std::count_if(logits.begin(), logits.end(), [&](float other) { return other > logit; });
        REQUIRE(result.logprob.rank == larger + 1);
        REQUIRE(result.top.size() == static_cast<size_t>(std::min(num_logprobs, n)));
        for (size_t j = 0; j < result.top.size(); ++j) {
          const TokenLogprob& top = result.top[j];
          REQUIRE(top.token == order[j]);
          REQUIRE(top.logprob ==
                  Approx(double{logits[order[j]]} - std::log(sum)).epsilon(1e-6).margin(2e-6));
          const bool tie = j > 0 && logits[order[j]] == logits[order[j - 1]];
          REQUIRE(top.rank == (tie ? result.top[j - 1].rank : static_cast<int>(j) + 1));
        }
      }
    }
    // All probabilities together are 1.
    if (n <= 100) {
      params.num_logprobs = n;
      Score(params, Pool());
      double total = 0;
      for (const TokenLogprob& top : results[0].top) total += std::exp(double{top.logprob});
      REQUIRE(total == Approx(1).epsilon(1e-5));
    }
  }
}

}  // namespace gloam::cpu
