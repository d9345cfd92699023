// Sidecars on the CPU: every quantiser within its bound on ordinary and adversarial keys, whatever
// the chunks, neighbours, threads and instruction set.
#include "kernels/sidecars.h"

#include <cfloat>
#include <string>

#include "catch2/catch.hpp"
#include "tests/kernels/sidecar_cache.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 20261123;
constexpr DType kDTypes[] = {DType::kBF16, DType::kF16, DType::kF32};
constexpr int kHeads = 2;

enum class Keys { kNormal, kConstant, kOutliers, kZeros, kSubnormal, kMixedSigns, kHuge };
constexpr Keys kAllKeys[] = {Keys::kNormal,    Keys::kConstant,   Keys::kOutliers, Keys::kZeros,
                             Keys::kSubnormal, Keys::kMixedSigns, Keys::kHuge};

float MakeKey(Keys keys, int token, int c, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const float x = normal(rng);
  switch (keys) {
    case Keys::kNormal:
      return x;
    case Keys::kConstant:  // within a channel, and nearly within a token
      return 3.7f + (c % 5 == 0 ? 0.0f : 0.001f) * static_cast<float>(c);
    case Keys::kOutliers:  // one channel 200 times the others, and off zero
      return c == 7 ? 200 * (3 + 0.1f * x) : c % 16 == 3 && token == 5 ? -200.0f : x;
    case Keys::kZeros:
      return c % 3 == 0 && token == 9 ? -0.0f : 0.0f;
    case Keys::kSubnormal:
      return x * 1e-40f;
    case Keys::kMixedSigns:
      return (token + c) % 2 == 0 ? 1 + x * 1e-3f : -1 - x * 1e-3f;
    case Keys::kHuge:
      return c % 2 == 0 ? 3.3e38f * std::tanh(x) : x;
  }
  return 0;
}

void Fill(SidecarCache& cache, Keys keys, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const KvLayout& layout = cache.kv.layout;
  for (int64_t block = 0; block < cache.kv.num_blocks; ++block) {
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      for (int token = 0; token < kBlockTokens; ++token) {
        for (int c = 0; c < layout.head_dim; ++c) {
          cache.Write(cache.IndexOf(false, block, head, token, c), MakeKey(keys, token, c, rng));
          cache.Write(cache.IndexOf(true, block, head, token, c), normal(rng) * 10);
        }
      }
    }
  }
}

// Calls f(cache) for filled caches of every kind of keys, type, size and number of bits.
template <typename F>
void ForEveryCache(const F& f) {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    for (const int head_dim : {64, 80, 128}) {
      for (const int bits : {2, 4, 8}) {
        for (const Keys keys : kAllKeys) {
          CAPTURE(static_cast<int>(dtype), head_dim, bits, static_cast<int>(keys));
          const int num_labels = 5 + bits;  // fills no row
          SidecarCache cache({dtype, kHeads, head_dim},
                             EveryKind(bits, head_dim, kHeads, num_labels, rng), 2);
          Fill(cache, keys, rng);
          cache.UpdateAll(pool);
          f(cache, keys);
        }
      }
    }
  }
}

template <typename F>
void ForEveryKey(const SidecarCache& cache, int channels, const F& f) {
  for (int64_t block = 0; block < cache.kv.num_blocks; ++block) {
    for (int head = 0; head < kHeads; ++head) {
      for (int token = 0; token < kBlockTokens; ++token) {
        for (int c = 0; c < channels; ++c) f(block, head, token, c);
      }
    }
  }
}

struct TokenRange {
  double min = DBL_MAX;
  double max = -DBL_MAX;
  void Add(double x) {
    min = std::min(min, x);
    max = std::max(max, x);
  }
  double magnitude() const { return std::max(std::fabs(min), std::fabs(max)); }
};

// Checks a mirror with scale and minimum per token; key(i) is what channel i was made from.
template <typename Key>
void CheckMinMaxToken(const SidecarCache& cache, SidecarKind kind, int64_t block, int head,
                      int token, int channels, const Key& key) {
  const int levels = (1 << cache.config.block_quant_bits) - 1;
  TokenRange range;
  for (int i = 0; i < channels; ++i) range.Add(key(i));
  const double scale = cache.TokenScale(kind, block, head, token);
  const double minimum = cache.TokenMinimum(kind, block, head, token);
  CAPTURE(static_cast<int>(kind), token, range.min, range.max, scale, minimum);
  REQUIRE(std::isfinite(scale));
  REQUIRE(std::isfinite(minimum));
  REQUIRE(scale > 0);
  if (range.magnitude() > 65504) return;
  REQUIRE(minimum <= range.min);
  const double below = std::fabs(range.min) * 0x1p-10 + 0x1p-24;
  REQUIRE(minimum >= range.min - below);
  REQUIRE(scale <= (range.max - range.min + below) / levels * (1 + 0x1p-10) + 0x1p-24);
  const double rounding = (range.max - minimum) * 0x1p-22;
  for (int i = 0; i < channels; ++i) {
    const double kept = cache.Dequantised(kind, block, head, token, i);
    REQUIRE(std::fabs(kept - key(i)) <= scale / 2 + rounding);
  }
}

}  // namespace

TEST_CASE("sidecar sizes") {
  std::mt19937 rng(kSeed);
  const KvLayout layout = {DType::kBF16, 3, 80};
  const SidecarConfig config = EveryKind(4, 80, 3, 9, rng);
  CHECK(SidecarBytes(SidecarKind::kRanges, config, layout) == 2 * 80 * 2);
  CHECK(SidecarBytes(SidecarKind::kBlockQuant, config, layout) == 80 * 16 / 2);
  CHECK(SidecarBytes(SidecarKind::kMinMaxQuant, config, layout) == 64 + 80 * 16 / 2);
  CHECK(SidecarBytes(SidecarKind::kMaxQuant, config, layout) == 64 + 80 * 16 / 2);
  CHECK(SidecarBytes(SidecarKind::kLabels, config, layout) == 64 + 16 * 16 / 2);
  CHECK(SidecarBytes(SidecarKind::kMeanValues, config, layout) == 192);  // 160 in lines of 64
  CHECK(SidecarBlockBytes(config, layout) == 3 * (320 + 640 + 704 + 704 + 192 + 192));
  CHECK(SidecarBlockBytes(SidecarConfig(), layout) == 0);
  // A server without sidecars may have any head.
  CHECK(SidecarBlockBytes(SidecarConfig(), {DType::kBF16, 1, 72}) == 0);
}

TEST_CASE("ranges are the extreme keys") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    for (int64_t block = 0; block < cache.kv.num_blocks; ++block) {
      for (int head = 0; head < kHeads; ++head) {
        for (int c = 0; c < cache.kv.layout.head_dim; ++c) {
          TokenRange range;
          for (int token = 0; token < kBlockTokens; ++token) {
            range.Add(cache.Key(block, head, token, c));
          }
          REQUIRE(cache.Min(block, head, c) == range.min);
          REQUIRE(cache.Max(block, head, c) == range.max);
        }
      }
    }
  });
}

TEST_CASE("block quants are within half a step") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    const int levels = (1 << cache.config.block_quant_bits) - 1;
    ForEveryKey(cache, cache.kv.layout.head_dim, [&](int64_t block, int head, int token, int c) {
      const double range = cache.Max(block, head, c) - cache.Min(block, head, c);
      const double key = cache.Key(block, head, token, c);
      const double kept = cache.Dequantised(SidecarKind::kBlockQuant, block, head, token, c);
      // Of subnormal keys the halves lose their last bit.
      REQUIRE(std::fabs(kept - key) <= range / levels / 2 + range * 0x1p-22 + 0x1p-148);
    });
  });
}

TEST_CASE("quants per token are within half a step") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    const int head_dim = cache.kv.layout.head_dim;
    ForEveryKey(cache, 1, [&](int64_t block, int head, int token, int) {
      CheckMinMaxToken(cache, SidecarKind::kMinMaxQuant, block, head, token, head_dim,
                       [&](int c) { return cache.Key(block, head, token, c); });
    });
  });
}

TEST_CASE("labels are the keys of the calibrated channels, within half a step") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    ForEveryKey(cache, 1, [&](int64_t block, int head, int token, int) {
      const int16_t* channels = cache.config.label_channels->Head(cache.layer, head);
      CheckMinMaxToken(cache, SidecarKind::kLabels, block, head, token, cache.config.num_labels(),
                       [&](int i) { return cache.Key(block, head, token, channels[i]); });
    });
  });
}

TEST_CASE("symmetric quants are within half a step") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    const int highest = (1 << (cache.config.max_quant_bits - 1)) - 1;
    const int head_dim = cache.kv.layout.head_dim;
    ForEveryKey(cache, 1, [&](int64_t block, int head, int token, int) {
      double largest = 0;
      for (int c = 0; c < head_dim; ++c) {
        largest = std::max(largest, std::fabs(cache.Key(block, head, token, c)));
      }
      const double scale = cache.TokenScale(SidecarKind::kMaxQuant, block, head, token);
      REQUIRE(std::isfinite(scale));
      REQUIRE(scale > 0);
      if (largest > 65504) return;
      REQUIRE(scale <= largest / highest * (1 + 0x1p-10) + 0x1p-24);
      for (int c = 0; c < head_dim; ++c) {
        const double kept = cache.Dequantised(SidecarKind::kMaxQuant, block, head, token, c);
        REQUIRE(std::fabs(kept - cache.Key(block, head, token, c)) <=
                scale / 2 + largest * 0x1p-22);
      }
    });
  });
}

TEST_CASE("mean values are the mean, rounded to the cache's type") {
  ForEveryCache([](const SidecarCache& cache, Keys) {
    const double half_ulp = cache.kv.layout.dtype == DType::kBF16  ? 0x1p-8
                            : cache.kv.layout.dtype == DType::kF16 ? 0x1p-11
                                                                   : 0x1p-24;
    for (int64_t block = 0; block < cache.kv.num_blocks; ++block) {
      for (int head = 0; head < kHeads; ++head) {
        const std::byte* means = cache.sidecars.At(SidecarKind::kMeanValues, block, head);
        for (int c = 0; c < cache.kv.layout.head_dim; ++c) {
          double sum = 0, magnitude = 0;
          for (int token = 0; token < kBlockTokens; ++token) {
            sum += cache.Value(block, head, token, c);
            magnitude += std::fabs(cache.Value(block, head, token, c));
          }
          const double fp32_error = magnitude / 16 * 16 * 0x1p-24;
          REQUIRE(std::fabs(cache.Read(means, c) - sum / 16) <=
                  std::fabs(sum / 16) * half_ulp * 1.01 + fp32_error + 0x1p-25);
        }
      }
    }
  });
}

TEST_CASE("only blocks that fill are written, whatever the chunks and neighbours") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  ThreadPool one(1), three(3);
  for (const DType dtype : kDTypes) {
    const SidecarConfig config = EveryKind(4, 64, kHeads, 12, rng);
    const KvLayout layout = {dtype, kHeads, 64};
    const int64_t num_blocks = 12;
    SidecarCache whole(layout, config, num_blocks);
    Fill(whole, Keys::kNormal, rng);
    const auto untouched = whole.Contents();
    // Two sequences: 5 full blocks and 3 tokens, and 4 full blocks.
    const std::vector<std::vector<int32_t>> tables = {{7, 2, 9, 0, 4, 11}, {5, 1, 10, 3}};
    const std::vector<int> lengths = {83, 64};
    whole.Update(tables, {0, 0}, lengths, three);
    const auto expected = whole.Contents();
    for (const int64_t block : {6, 8, 11}) {
      for (int k = 0; k < kNumSidecarKinds; ++k) {
        const int64_t bytes = whole.sidecars.head_bytes[k];
        for (int head = 0; head < kHeads; ++head) {
          const int64_t at = (head * num_blocks + block) * bytes;
          const auto begin = expected[k].begin() + at;
          REQUIRE(std::equal(begin, begin + bytes, untouched[k].begin() + at));
        }
      }
    }

    const auto check = [&](const char* what, const auto& run) {
      CAPTURE(what);
      SidecarCache cache(layout, config, num_blocks);
      std::memcpy(cache.kv.data, whole.kv.data, layout.block_bytes() * num_blocks);
      run(cache);
      REQUIRE(cache.Contents() == expected);
    };
    check("token by token", [&](SidecarCache& cache) {
      for (int i = 0; i < 83; ++i) {
        const int j = std::min(i, 63);
        const int num_second = i < 64 ? 1 : 0;  // then the second sequence has no token
        cache.Update(tables, {i, j + 1 - num_second}, {i + 1, j + 1}, one);
      }
    });
    check("chunks of random sizes, one sequence after the other", [&](SidecarCache& cache) {
      for (int seq = 0; seq < 2; ++seq) {
        for (int begin = 0; begin < lengths[seq];) {
          const int end = std::min(lengths[seq], begin + 1 + static_cast<int>(rng() % 40));
          cache.Update({tables[seq]}, {begin}, {end}, three);
          begin = end;
        }
      }
    });
    ForEachSimdTarget([&] {
      check("all at once", [&](SidecarCache& cache) {
        cache.Update(tables, {0, 0}, lengths, one);
      });
    });
  }
}

TEST_CASE("without sidecars, or with nothing filled, nothing happens") {
  std::mt19937 rng(kSeed + 2);
  ThreadPool pool(1);
  SidecarCache cache({DType::kBF16, kHeads, 64}, EveryKind(4, 64, kHeads, 12, rng), 2);
  const auto untouched = cache.Contents();
  cache.Update({{0, 1}}, {0}, {15}, pool);
  cache.Update({{0, 1}}, {16}, {31}, pool);
  cache.sidecars.config = nullptr;
  cache.Update({{0, 1}}, {0}, {32}, pool);
  CHECK(cache.Contents() == untouched);
}

}  // namespace gloam::cpu
