// Top-k against sorting, on random and on hostile scores, for every instruction set.
#include "kernels/cpu/sparse/top_k.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 20261123;

bool Has(const std::vector<TokenMask>& masks, int64_t token) {
  return (masks[token / kBlockTokens] >> token % kBlockTokens & 1) != 0;
}

// Largest first, the lowest index among equals, NaN last.
void SortByScore(const std::vector<float>& scores, std::vector<int64_t>& indices) {
  const auto rank = [&](int64_t i) {
    return std::isnan(scores[i]) ? -std::numeric_limits<double>::infinity()
                                 : static_cast<double>(scores[i]);
  };
  std::stable_sort(indices.begin(), indices.end(), [&](int64_t a, int64_t b) {
    if (rank(a) != rank(b)) return rank(a) > rank(b);
    return !std::isnan(scores[a]) && std::isnan(scores[b]);  // -infinity is above NaN
  });
}

std::vector<TokenMask> TopTokensBySorting(const std::vector<float>& scores, int64_t count,
                                          const std::vector<TokenMask>& masks) {
  std::vector<int64_t> tokens;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (Has(masks, static_cast<int64_t>(i))) tokens.push_back(static_cast<int64_t>(i));
  }
  SortByScore(scores, tokens);
  tokens.resize(std::clamp<int64_t>(count, 0, static_cast<int64_t>(tokens.size())));
  std::vector<TokenMask> kept(masks.size(), kNoTokens);
  for (const int64_t token : tokens) {
    kept[token / kBlockTokens] |= static_cast<TokenMask>(1 << token % kBlockTokens);
  }
  return kept;
}

float Normal(std::mt19937& rng) { return std::normal_distribution<float>()(rng); }

using ScoreOf = std::function<float(int64_t, std::mt19937&)>;
const std::vector<std::pair<const char*, ScoreOf> >& Kinds() {
  static const std::vector<std::pair<const char*, ScoreOf> > kinds = {
      {"normal", [](int64_t, std::mt19937& rng) { return Normal(rng); }},
      {"negative", [](int64_t, std::mt19937& rng) { return -std::fabs(Normal(rng)) - 1; }},
      {"ties", [](int64_t, std::mt19937& rng) { return std::round(Normal(rng)); }},
      {"all equal", [](int64_t, std::mt19937&) { return 2.5f; }},
      {"zeros of both signs", [](int64_t i, std::mt19937&) { return i % 2 == 0 ? -0.0f : 0.0f; }},
      {"ascending", [](int64_t i, std::mt19937&) { return static_cast<float>(i); }},
      {"descending", [](int64_t i, std::mt19937&) { return static_cast<float>(-i); }},
      {"all scales",
       [](int64_t, std::mt19937& rng) {
         return std::ldexp(Normal(rng), static_cast<int>(rng() % 240) - 120);
       }},
      {"outlier", [](int64_t i, std::mt19937& rng) { return i == 17 ? 1e38f : Normal(rng); }},
      {"neighbours",
       [](int64_t, std::mt19937& rng) {
         return rng() % 2 == 0 ? 1.0f : std::nextafter(1.0f, 2.0f);
       }},
      {"special",
       [](int64_t, std::mt19937& rng) {
         constexpr float kInfinity = std::numeric_limits<float>::infinity();
         constexpr float kSome[] = {kInfinity, -kInfinity, 0.0f, 1.0f, -1.0f, 1e-42f, -1e-42f};
         return rng() % 8 == 0 ? std::numeric_limits<float>::quiet_NaN() : kSome[rng() % 7];
       }},
  };
  return kinds;
}

void CheckRandomRows(int rows_per_kind, std::mt19937& rng) {
  for (const auto& [name, score_of] : Kinds()) {
    CAPTURE(name);
    for (int row = 0; row < rows_per_kind; ++row) {
      constexpr int kSizes[] = {1, 2, 5, 33, 128};
      const int num_blocks = kSizes[rng() % std::size(kSizes)];
      std::vector<float> scores(static_cast<size_t>(num_blocks) * kBlockTokens);
      for (size_t i = 0; i < scores.size(); ++i) {
        scores[i] = score_of(static_cast<int64_t>(i), rng);
      }
      std::vector<TokenMask> masks(num_blocks);
      for (TokenMask& mask : masks) {
        const uint32_t bits = rng();
        mask = rng() % 4 == 0   ? kNoTokens
               : rng() % 2 == 0 ? kAllTokens
                                : static_cast<TokenMask>(bits);
      }
      const int64_t total = CountTokens(masks.data(), num_blocks);
      for (const int64_t count : {int64_t{0}, int64_t{1}, total / 3, total - 1, total, total + 5}) {
        CAPTURE(row, num_blocks, total, count);
        std::vector<TokenMask> kept = masks;
        KeepTopTokens(scores.data(), count, num_blocks, kept.data());
        REQUIRE(kept == TopTokensBySorting(scores, count, masks));
      }
    }
  }
}

TEST_CASE("The tokens with the largest scores", "[top_k]") {
  std::mt19937 rng(kSeed);
  CheckRandomRows(100, rng);
}

TEST_CASE("Every instruction set keeps the same tokens", "[top_k]") {
  ForEachSimdTarget([&] {
    std::mt19937 rng(kSeed + 1);
    CheckRandomRows(10, rng);
  });
}

TEST_CASE("The blocks with the largest scores", "[top_k]") {
  std::mt19937 rng(kSeed + 2);
  for (int row = 0; row < 500; ++row) {
    const int num_blocks = 1 + static_cast<int>(rng() % 70);
    std::vector<float> scores((num_blocks + 15) / 16 * 16, std::numeric_limits<float>::infinity());
    for (int i = 0; i < num_blocks; ++i) scores[i] = std::round(3 * Normal(rng));
    std::vector<TokenMask> masks(num_blocks);
    std::vector<int64_t> blocks;
    for (int i = 0; i < num_blocks; ++i) {
      masks[i] = rng() % 4 == 0 ? kNoTokens : static_cast<TokenMask>(1 + rng() % 0xffff);
      if (masks[i] != kNoTokens) blocks.push_back(i);
    }
    SortByScore(scores, blocks);
    const auto count = static_cast<int64_t>(rng() % (num_blocks + 2));
    blocks.resize(std::min(count, static_cast<int64_t>(blocks.size())));
    std::vector<TokenMask> expected(num_blocks, kNoTokens);
    for (const int64_t block : blocks) expected[block] = masks[block];
    CAPTURE(row, num_blocks, count);
    KeepTopBlocks(scores.data(), count, num_blocks, masks.data());
    REQUIRE(masks == expected);
  }
}

}  // namespace
}  // namespace gloam::cpu
