// Block scores, quest's bounds, against double precision on every instruction set; what quest
// selects by them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/sparse/block_scores.h"
#include "tests/kernels/selector_context.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

// Minimum and maximum of a channel of a block's keys.
std::pair<double, double> RangeOf(const Context& context, int64_t block, int kv_head, int channel) {
  double min = std::numeric_limits<double>::infinity();
  double max = -min;
  for (int i = 0; i < kBlockTokens; ++i) {
    const double key = context.Key(block * kBlockTokens + i, kv_head, channel);
    min = std::min(min, key);
    max = std::max(max, key);
  }
  return {min, max};
}

double BoundOf(const Context& context, int64_t block, int kv_head, int head) {
  double bound = 0;
  for (int c = 0; c < context.shape().head_dim; ++c) {
    const auto [min, max] = RangeOf(context, block, kv_head, c);
    const double q = context.query(head, c);
    bound += std::max(q * min, q * max);
  }
  return bound;
}

const std::vector<std::pair<const char*, KeyOf>>& KindsOfKeys() {
  static const std::vector<std::pair<const char*, KeyOf>> kinds = {
      {"normal", [](int64_t, int, std::mt19937& rng) { return Normal(rng); }},
      {"constant", [](int64_t, int channel, std::mt19937&) { return 0.25f * channel - 3; }},
      {"zero", [](int64_t, int, std::mt19937&) { return 0.0f; }},
      {"negative", [](int64_t, int, std::mt19937& rng) { return -std::fabs(Normal(rng)) - 0.5f; }},
      {"outlier channel",
       [](int64_t, int channel, std::mt19937& rng) {
         return channel == 7 ? 200 + Normal(rng) : Normal(rng);
       }},
      {"outlier token",
       [](int64_t token, int, std::mt19937& rng) {
         return token % 37 == 5 ? -60000.0f : Normal(rng);
       }},
      {"subnormal", [](int64_t, int, std::mt19937& rng) { return 1e-40f * Normal(rng); }},
      {"cancelling", [](int64_t token, int channel,
                        std::mt19937&) { return (token + channel) % 2 == 0 ? 1000.0f : -1000.0f; }},
  };
  return kinds;
}

void CheckBounds(const Context& context) {
  const Shape& shape = context.shape();
  const int64_t stride = context.num_blocks() * kBlockTokens;
  const std::vector<TokenMask> masks = AllCandidates(context);
  for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    std::vector<float> scores(static_cast<size_t>(shape.num_heads * stride));
    ScoreBlocks({.keys = context.Keys(kv_head),
                 .queries = context.queries(),
                 .num_heads = shape.num_heads,
                 .head_dim = shape.head_dim,
                 .masks = masks.data(),
                 .scores = scores.data()});
    for (int head = 0; head < shape.num_heads; ++head) {
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        CAPTURE(kv_head, head, block);
        double magnitude = 0;  // of the corner that the bound is at
        for (int c = 0; c < shape.head_dim; ++c) {
          double largest = 0;
          for (int i = 0; i < kBlockTokens; ++i) {
            const double key = context.Key(block * kBlockTokens + i, kv_head, c);
            largest = std::max(largest, std::fabs(key));
          }
          magnitude += std::fabs(static_cast<double>(context.query(head, c))) * largest;
        }
        const double rounding = shape.head_dim * 0x1p-24 * magnitude + 1e-44;
        const double score = scores[head * stride + block];
        REQUIRE(std::fabs(score - BoundOf(context, block, kv_head, head)) <= rounding);
        for (int i = 0; i < kBlockTokens; ++i) {
          REQUIRE(context.Logit(block * kBlockTokens + i, kv_head, head) <= score + rounding);
        }
      }
    }
  }
}

TEST_CASE("Block scores bound every logit of the block", "[selector]") {
  std::mt19937 rng(kSeed + 9);
  for (const auto& [name, key_of] : KindsOfKeys()) {
    CAPTURE(name);
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const int num_heads : {1, 2, 3, 4, 7}) {
        for (const int head_dim : {16, 64, 80, 128}) {
          const Shape shape = {.dtype = dtype,
                               .num_kv_heads = 2,
                               .num_heads = num_heads,
                               .head_dim = head_dim,
                               .length = 120};
          CheckBounds(Context(shape, rng, key_of));
        }
      }
    }
  }
}

TEST_CASE("Block scores on every instruction set", "[selector]") {
  ForEachSimdTarget([&] {
    std::mt19937 rng(kSeed + 10);
    const Context context({.num_heads = 5, .head_dim = 48, .length = 200}, rng);
    CheckBounds(context);
  });
}

TEST_CASE("quest selects whole blocks, those with the largest bounds", "[selector]") {
  std::mt19937 rng(kSeed + 11);
  const Context context({.length = 260}, rng);  // 16 full blocks and the open one
  for (const int budget : {1, 16, 17, 100, 256, 257, 300}) {
    const SelectorConfig config = ConfigOf("quest", {{"token_budget", budget}});
    const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
    const Selection selection = SelectFrom(context, config, 1, candidates);
    for (int head = 0; head < context.shape().num_heads; ++head) {
      CAPTURE(budget, head);
      int num_candidates = 0;
      int num_selected = 0;
      double worst_taken = std::numeric_limits<double>::infinity();
      double best_left = -worst_taken;
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        const int64_t i = head * context.num_blocks() + block;
        if (candidates[i] == kNoTokens) continue;
        ++num_candidates;
        const double bound = BoundOf(context, block, 1, head);
        if (selection.masks[i] == kNoTokens) {
          best_left = std::max(best_left, bound);
        } else {
          REQUIRE(selection.masks[i] == candidates[i]);
          ++num_selected;
          worst_taken = std::min(worst_taken, bound);
        }
      }
      CHECK(num_selected == std::min(num_candidates, (budget + 15) / 16 - 1));
      CHECK(best_left <= worst_taken + RoundingOf(context, 1));
    }
  }
}

// The middle of the range and `weight` of its half, which is Quest's bound at 1.
double ScoreOf(const Context& context, int64_t block, int kv_head, int head, double weight) {
  double score = 0;
  for (int c = 0; c < context.shape().head_dim; ++c) {
    const auto [min, max] = RangeOf(context, block, kv_head, c);
    const double q = context.query(head, c);
    score += q * (min + max) / 2 + weight * std::fabs(q) * (max - min) / 2;
  }
  return score;
}

TEST_CASE("Block scores count a part of the range", "[selector]") {
  std::mt19937 rng(kSeed + 12);
  const Context context({.length = 200}, rng);
  const std::vector<TokenMask> masks = AllCandidates(context);
  const int64_t stride = context.num_blocks() * kBlockTokens;
  for (const float weight : {0.0f, 0.25f, 0.5f, 1.0f}) {
    std::vector<float> scores(static_cast<size_t>(context.shape().num_heads * stride));
    ScoreBlocks({.keys = context.Keys(1),
                 .queries = context.queries(),
                 .num_heads = context.shape().num_heads,
                 .head_dim = context.shape().head_dim,
                 .range_weight = weight,
                 .masks = masks.data(),
                 .scores = scores.data()});
    for (int head = 0; head < context.shape().num_heads; ++head) {
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        CAPTURE(weight, head, block);
        const double exact = ScoreOf(context, block, 1, head, double{weight});
        CHECK(std::fabs(scores[head * stride + block] - exact) <= RoundingOf(context, 1));
      }
    }
  }
}

}  // namespace
}  // namespace gloam::cpu
