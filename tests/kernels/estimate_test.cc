// Estimated logits against plain loops over the dequantised keys, and bit for bit against
// themselves under other candidates, heads and instruction sets.
#include "kernels/estimate.h"

#include <bit>
#include <limits>

#include "catch2/catch.hpp"
#include "kernels/cpu/vnni.h"
#include "tests/kernels/sidecar_cache.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 42;
constexpr int kKvHeads = 2;
constexpr int kNumBlocks = 21;  // of the sequence: batches and a rest
constexpr int kPoolBlocks = 25;
constexpr float kUntouched = -12345.0f;

struct Fixture {
  SidecarCache cache;
  ThreadPool pool{2};
  std::vector<int32_t> table;
  int num_heads;
  std::vector<float> queries;
  std::vector<TokenMask> masks;  // [num_heads][kNumBlocks]

  Fixture(DType dtype, int head_dim, int bits, int heads, std::mt19937& rng)
      : cache({dtype, kKvHeads, head_dim}, EveryKind(bits, head_dim, kKvHeads, 11, rng),
              kPoolBlocks),
        table(kPoolBlocks),
        num_heads(heads),
        queries(heads * head_dim),
        masks(heads * kNumBlocks) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < cache.kv.num_blocks * cache.kv.layout.block_elements(); ++i) {
      const int c = static_cast<int>(i % head_dim);
      // One channel as an attention bias makes it, one that does not vary.
      cache.Write(i, c == 9 ? 40 + 2 * normal(rng) : c == 20 ? 1.5f : normal(rng));
    }
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), rng);
    table.resize(kNumBlocks);
    cache.Update({table}, {0}, {kNumBlocks * kBlockTokens}, pool);
    for (float& q : queries) q = normal(rng) / 8;
    // About a third of the blocks has no candidate in any head.
    for (int i = 0; i < kNumBlocks; ++i) {
      const bool none = rng() % 3 == 0;
      for (int h = 0; h < heads; ++h) {
        masks[h * kNumBlocks + i] = none ? kNoTokens : static_cast<TokenMask>(rng() & rng());
      }
    }
  }
  int head_dim() const { return cache.kv.layout.head_dim; }
  KeyBlocks Keys(int kv_head) const {
    return {cache.kv, cache.sidecars, table.data(), kNumBlocks, kv_head};
  }
  bool IsCandidate(int i) const {
    for (int h = 0; h < num_heads; ++h) {
      if (masks[h * kNumBlocks + i] != kNoTokens) return true;
    }
    return false;
  }

  std::vector<float> Run(EstimatorType type, int kv_head = 1) const {
    std::vector<float> logits(num_heads * kNumBlocks * kBlockTokens, kUntouched);
    EstimateParams params;
    params.estimator = {type, cache.config.block_quant_bits};
    params.keys = Keys(kv_head);
    params.queries = queries.data();
    params.num_heads = num_heads;
    params.head_dim = head_dim();
    params.masks = masks.data();
    params.logits = logits.data();
    Estimate(params);
    return logits;
  }
  std::vector<float> RunLabels(int kv_head = 1) const {
    std::vector<float> logits(num_heads * kNumBlocks * kBlockTokens, kUntouched);
    EstimateFromLabelsParams params;
    params.keys = Keys(kv_head);
    params.layer = cache.layer;
    params.queries = queries.data();
    params.num_heads = num_heads;
    params.head_dim = head_dim();
    params.masks = masks.data();
    params.logits = logits.data();
    EstimateFromLabels(params);
    return logits;
  }
};

SidecarKind KindOf(EstimatorType type) {
  return type == EstimatorType::kBlockQuant    ? SidecarKind::kBlockQuant
         : type == EstimatorType::kMinMaxQuant ? SidecarKind::kMinMaxQuant
                                               : SidecarKind::kMaxQuant;
}

struct Expected {
  double logit = 0;
  double tolerance = 0;
};

// The plain loop, and how far kernels/estimate.h lets the estimate be from it. fp32: sums of up to
// d terms, each at most a few roundings off.
Expected Reference(const Fixture& f, EstimatorType type, int kv_head, int64_t block, int token,
                   const float* query) {
  const SidecarCache& cache = f.cache;
  const int bits = cache.config.block_quant_bits;
  const double levels = (1 << bits) - 1;
  const int d = f.head_dim();
  const double scale = type == EstimatorType::kNone || type == EstimatorType::kBlockQuant
                           ? 1
                           : cache.TokenScale(KindOf(type), block, kv_head, token);
  Expected expected;
  double largest_weight = 0, magnitude = 0;
  for (int c = 0; c < d; ++c) {
    const double q = query[c];
    if (type == EstimatorType::kNone) {
      const double term = q * cache.Key(block, kv_head, token, c);
      expected.logit += term;
      magnitude += std::fabs(term);
      continue;
    }
    expected.logit += q * cache.Dequantised(KindOf(type), block, kv_head, token, c);
    if (type == EstimatorType::kBlockQuant) {
      const double min = cache.Min(block, kv_head, c), max = cache.Max(block, kv_head, c);
      largest_weight = std::max(largest_weight, std::fabs(q) * (max - min) / levels);
      magnitude += std::fabs(q) * std::max(std::fabs(min), std::fabs(max));
    } else {
      const double minimum =
          type == EstimatorType::kMinMaxQuant
              ? cache.TokenMinimum(SidecarKind::kMinMaxQuant, block, kv_head, token)
              : 0;
      largest_weight = std::max(largest_weight, std::fabs(q) * scale);
      magnitude += std::fabs(q) * (std::fabs(minimum) + levels * scale);
    }
  }
  const bool one_plane = type == EstimatorType::kBlockQuant && bits <= 4;
  expected.tolerance = magnitude * d * 0x1p-24;
  if (type != EstimatorType::kNone) {
    expected.tolerance += d * levels / 2 * largest_weight / (one_plane ? 254 : 32512) * 1.001;
  }
  return expected;
}

constexpr EstimatorType kMirrors[] = {EstimatorType::kBlockQuant, EstimatorType::kMinMaxQuant,
                                      EstimatorType::kMaxQuant};
constexpr EstimatorType kAll[] = {EstimatorType::kNone, EstimatorType::kBlockQuant,
                                  EstimatorType::kMinMaxQuant, EstimatorType::kMaxQuant};

void CheckAgainstReference(const Fixture& f, EstimatorType type) {
  for (int kv_head = 0; kv_head < kKvHeads; ++kv_head) {
    const std::vector<float> logits = f.Run(type, kv_head);
    for (int h = 0; h < f.num_heads; ++h) {
      for (int i = 0; i < kNumBlocks; ++i) {
        for (int token = 0; token < kBlockTokens; ++token) {
          const float logit = logits[(h * kNumBlocks + i) * kBlockTokens + token];
          if (!f.IsCandidate(i)) {
            REQUIRE(logit == kUntouched);
            continue;
          }
          const Expected expected =
              Reference(f, type, kv_head, f.table[i], token, f.queries.data() + h * f.head_dim());
          CAPTURE(h, i, token, expected.logit, expected.tolerance);
          REQUIRE(std::fabs(logit - expected.logit) <= expected.tolerance);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("estimates equal a plain loop over the dequantised keys") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int head_dim : {64, 80, 128}) {
      for (const int bits : {2, 4, 8}) {
        for (const int heads : {1, 3, 4, 7}) {
          const Fixture f(dtype, head_dim, bits, heads, rng);
          for (const EstimatorType type : kAll) {
            CAPTURE(static_cast<int>(dtype), head_dim, bits, heads, static_cast<int>(type));
            CheckAgainstReference(f, type);
          }
        }
      }
    }
  }
}

TEST_CASE("what rounding the weights costs is small beside the quants") {
  // Root mean square over many logits: the estimate's distance from the dequantised keys' logits
  // against that of the latter from the exact ones.
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  for (const int head_dim : {64, 128}) {
    const Fixture f(DType::kBF16, head_dim, 4, 7, rng);
    const std::vector<float> logits = f.Run(EstimatorType::kBlockQuant);
    double from_weights = 0, from_quants = 0;
    for (int h = 0; h < f.num_heads; ++h) {
      for (int i = 0; i < kNumBlocks; ++i) {
        if (!f.IsCandidate(i)) continue;
        for (int token = 0; token < kBlockTokens; ++token) {
          const float* query = f.queries.data() + h * head_dim;
          const int64_t block = f.table[i];
          const double quantised =
              Reference(f, EstimatorType::kBlockQuant, 1, block, token, query).logit;
          const double exact = Reference(f, EstimatorType::kNone, 1, block, token, query).logit;
          const double logit = logits[(h * kNumBlocks + i) * kBlockTokens + token];
          from_weights += (logit - quantised) * (logit - quantised);
          from_quants += (quantised - exact) * (quantised - exact);
        }
      }
    }
    CAPTURE(head_dim, from_weights, from_quants);
    CHECK(from_quants > 0);
    CHECK(std::sqrt(from_weights) <= 0.2 * std::sqrt(from_quants));
  }
}

TEST_CASE("label estimates equal a plain loop over the labels") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 2);
  for (const int bits : {2, 4, 8}) {
    for (const int heads : {1, 6}) {
      const Fixture f(DType::kBF16, 80, bits, heads, rng);
      const std::vector<float> logits = f.RunLabels();
      const int16_t* channels = f.cache.config.label_channels->Head(f.cache.layer, 1);
      const int num_labels = f.cache.config.num_labels();
      for (int h = 0; h < heads; ++h) {
        for (int at = 0; at < kNumBlocks * kBlockTokens; ++at) {
          const int token = at % kBlockTokens;
          const int64_t block = f.table[at / kBlockTokens];
          const float logit = logits[h * kNumBlocks * kBlockTokens + at];
          if (!f.IsCandidate(at / kBlockTokens)) {
            REQUIRE(logit == kUntouched);
            continue;
          }
          const double scale = f.cache.TokenScale(SidecarKind::kLabels, block, 1, token);
          double expected = 0, magnitude = 0, largest = 0;
          for (int i = 0; i < num_labels; ++i) {
            const double q = f.queries[h * 80 + channels[i]];
            expected += q * f.cache.Dequantised(SidecarKind::kLabels, block, 1, token, i);
            largest = std::max(largest, std::fabs(q));
            magnitude += std::fabs(q) * (60 + scale * ((1 << bits) - 1));
          }
          const double rounding =
              num_labels * scale * ((1 << bits) - 1) / 2.0 * largest / 32512 * 1.001;
          REQUIRE(std::fabs(logit - expected) <= rounding + magnitude * num_labels * 0x1p-24);
        }
      }
    }
  }
}

TEST_CASE("a block's logits depend on the block and the head's query alone") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 3);
  Fixture f(DType::kBF16, 64, 4, 7, rng);
  for (const EstimatorType type : kAll) {
    CAPTURE(static_cast<int>(type));
    std::fill(f.masks.begin(), f.masks.end(), kAllTokens);
    const std::vector<float> all = f.Run(type);
    for (int i = 0; i < kNumBlocks; ++i) {
      // This block alone, by one token of one head.
      std::fill(f.masks.begin(), f.masks.end(), kNoTokens);
      f.masks[rng() % 7 * kNumBlocks + i] = static_cast<TokenMask>(1 << rng() % 16);
      const std::vector<float> alone = f.Run(type);
      for (int h = 0; h < 7; ++h) {
        const int at = (h * kNumBlocks + i) * kBlockTokens;
        REQUIRE(std::memcmp(&alone[at], &all[at], kBlockTokens * sizeof(float)) == 0);
      }
    }
    // Fewer heads: the others' sums are the same wherever they are computed.
    std::fill(f.masks.begin(), f.masks.end(), kAllTokens);
    for (int first = 0; first < 7; ++first) {
      Fixture one(DType::kBF16, 64, 4, 1, rng);
      std::memcpy(one.cache.kv.data, f.cache.kv.data,
                  f.cache.kv.layout.block_bytes() * kPoolBlocks);
      one.table = f.table;
      one.cache.Update({one.table}, {0}, {kNumBlocks * kBlockTokens}, one.pool);
      std::copy_n(f.queries.begin() + first * 64, 64, one.queries.begin());
      std::fill(one.masks.begin(), one.masks.end(), kAllTokens);
      const std::vector<float> logits = one.Run(type);
      REQUIRE(std::memcmp(logits.data(), &all[first * logits.size()],
                          logits.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("estimates from mirrors are the same on every SIMD target") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 4);
  for (const int bits : {2, 4, 8}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      const Fixture f(dtype, 80, bits, 7, rng);
      for (const EstimatorType type : kMirrors) {
        const std::vector<float> expected = f.Run(type);
        ForEachSimdTarget([&] {
          for (const bool without_vnni : {false, true}) {
            CAPTURE(without_vnni, bits, static_cast<int>(dtype), static_cast<int>(type));
            DisableVnniForTest(without_vnni);
            REQUIRE(f.Run(type) == expected);
          }
          DisableVnniForTest(false);
        });
      }
      const std::vector<float> expected = f.RunLabels();
      ForEachSimdTarget([&] {
        CAPTURE(bits);
        REQUIRE(f.RunLabels() == expected);
        CheckAgainstReference(f, EstimatorType::kNone);
      });
    }
  }
}

TEST_CASE("estimates of queries and keys without any variation") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 5);
  Fixture f(DType::kF32, 64, 4, 3, rng);
  std::fill(f.masks.begin(), f.masks.end(), kAllTokens);
  SECTION("zero queries") {
    std::fill(f.queries.begin(), f.queries.end(), 0.0f);
    for (const EstimatorType type : kAll) {
      for (const float logit : f.Run(type)) REQUIRE(logit == 0.0f);
    }
  }
  SECTION("zero keys") {
    for (int64_t i = 0; i < kPoolBlocks * f.cache.kv.layout.block_elements(); ++i) {
      f.cache.Write(i, 0.0f);
    }
    f.cache.Update({f.table}, {0}, {kNumBlocks * kBlockTokens}, f.pool);
    for (const EstimatorType type : kAll) {
      for (const float logit : f.Run(type)) REQUIRE(std::fabs(logit) <= 1e-6f);
    }
  }
}

}  // namespace gloam::cpu
