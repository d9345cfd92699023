#include "kernels/rope_kv.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/float16.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 11;
constexpr int kMaxPositions = 300;

struct Case {
  int num_tokens = 1;
  int num_heads = 3;
  int num_kv_heads = 1;
  int head_dim = 64;
  int rotary_dim = 64;
  RopeStyle style = RopeStyle::kNeox;
  DType dtype = DType::kBF16;
};

// Runs one case on a fused QKV matrix and compares every element that may change, and every one
// that may not, with the definition in double precision.
void Check(const Case& c, ThreadPool& pool, std::mt19937& rng) {
  CAPTURE(c.num_tokens, c.num_heads, c.num_kv_heads, c.head_dim, c.rotary_dim,
          static_cast<int>(c.style), static_cast<int>(c.dtype));
  std::normal_distribution<float> normal;
  const int half = c.rotary_dim / 2;
  std::vector<float> cos(kMaxPositions * std::max(half, 1)), sin(cos.size());
  for (size_t i = 0; i < cos.size(); ++i) {
    const double angle = normal(rng) * 3;
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
  const int64_t width = int64_t{c.num_heads + 2 * c.num_kv_heads} * c.head_dim;
  std::vector<float> qkv(c.num_tokens * width);
  for (float& x : qkv) x = normal(rng);
  const std::vector<float> before = qkv;

  KvLayerView kv;
  kv.layout = {c.dtype, c.num_kv_heads, c.head_dim};
  kv.num_blocks = c.num_tokens / kBlockTokens + 2;
  const int64_t num_slots = kv.num_blocks * kBlockTokens;
  std::vector<std::byte> memory(kv.layout.block_bytes() * kv.num_blocks, std::byte{0xA5});
  const std::vector<std::byte> untouched = memory;
  kv.data = memory.data();
  std::vector<int64_t> slots(num_slots);
  for (int64_t i = 0; i < num_slots; ++i) slots[i] = i;
  std::shuffle(slots.begin(), slots.end(), rng);
  std::vector<int32_t> positions(c.num_tokens);
  for (int32_t& position : positions) position = static_cast<int32_t>(rng() % kMaxPositions);

  const auto view = [&](int first_head, int heads) {
    TensorView v = TensorView::Contiguous(qkv.data() + first_head * c.head_dim, DType::kF32,
                                          Device::kCpu, {c.num_tokens, heads, c.head_dim});
    v.strides[0] = width;
    return v;
  };
  RopeKvParams params;
  params.batch.num_tokens = c.num_tokens;
  params.batch.positions = positions.data();
  params.batch.slot_mapping = slots.data();
  params.q = view(0, c.num_heads);
  params.k = view(c.num_heads, c.num_kv_heads);
  params.v = view(c.num_heads + c.num_kv_heads, c.num_kv_heads);
  params.cos = cos.data();
  params.sin = sin.data();
  params.rotary_dim = c.rotary_dim;
  params.style = c.style;
  params.kv = kv;
  RopeAppendKv(params, pool);

  for (int token = 0; token < c.num_tokens; ++token) {
    for (int head = 0; head < c.num_heads + 2 * c.num_kv_heads; ++head) {
      const int64_t at = token * width + int64_t{head} * c.head_dim;
      for (int i = 0; i < c.head_dim; ++i) {
        double expected = before[at + i];
        if (head < c.num_heads + c.num_kv_heads && i < c.rotary_dim) {
          const bool neox = c.style == RopeStyle::kNeox;
          const int pair = neox ? i % half : i / 2;
          const bool second = neox ? i >= half : i % 2 == 1;
          const double x0 = before[at + (neox ? pair : 2 * pair)];
          const double x1 = before[at + (neox ? pair + half : 2 * pair + 1)];
          const double cosine = cos[positions[token] * half + pair];
          const double sine = sin[positions[token] * half + pair];
          expected = second ? x1 * cosine + x0 * sine : x0 * cosine - x1 * sine;
        }
        REQUIRE(qkv[at + i] == Approx(expected).margin(1e-6));
      }
    }
  }
  // The cache holds exactly the rotated keys and the values, rounded, in their slots; every other
  // slot is as it was.
  std::vector<int> token_at(num_slots, -1);
  for (int token = 0; token < c.num_tokens; ++token) token_at[slots[token]] = token;
  const int64_t bytes = static_cast<int64_t>(DTypeBytes(c.dtype));
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    for (int part = 0; part < 2 * c.num_kv_heads; ++part) {
      const int64_t run = slot / kBlockTokens * 2 * c.num_kv_heads + part;
      for (int i = 0; i < c.head_dim; ++i) {
        const int64_t at = ((run * kBlockTokens + slot % kBlockTokens) * c.head_dim + i) * bytes;
        if (token_at[slot] < 0) {
          REQUIRE(std::equal(&memory[at], &memory[at] + bytes, &untouched[at]));
          continue;
        }
        const float expected = qkv[token_at[slot] * width + (c.num_heads + part) * c.head_dim + i];
        if (c.dtype == DType::kBF16) {
          REQUIRE(*reinterpret_cast<uint16_t*>(&memory[at]) == Bf16FromFloat(expected));
        } else if (c.dtype == DType::kF16) {
          REQUIRE(*reinterpret_cast<uint16_t*>(&memory[at]) == F32ToF16(expected));
        } else {
          REQUIRE(*reinterpret_cast<float*>(&memory[at]) == expected);
        }
      }
    }
  }
}

}  // namespace

TEST_CASE("rope rotates and the cache receives, in both styles and dtypes") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(2);
  for (const RopeStyle style : {RopeStyle::kNeox, RopeStyle::kInterleaved}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      Check({1, 9, 3, 64, 64, style, dtype}, pool, rng);
      Check({17, 4, 4, 128, 128, style, dtype}, pool, rng);
      Check({60, 8, 1, 64, 64, style, dtype}, pool, rng);
      Check({5, 2, 1, 80, 20, style, dtype}, pool, rng);  // partial, not a multiple of the lanes
      Check({3, 2, 2, 48, 0, style, dtype}, pool, rng);   // no rotation
    }
  }
}

TEST_CASE("rope is right on every SIMD target") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(1);
  ForEachSimdTarget([&] {
    Check({3, 3, 1, 64, 52, RopeStyle::kNeox, DType::kBF16}, pool, rng);
    Check({3, 3, 1, 64, 52, RopeStyle::kInterleaved, DType::kF32}, pool, rng);
  });
}

TEST_CASE("fp16 rounds to nearest even, through subnormals, and comes back exactly") {
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const float value = F16ToF32(static_cast<uint16_t>(half));
    REQUIRE(F32ToF16(value) == half);
    REQUIRE(F32ToF16(-value) == (half | 0x8000));
    if (half + 1 == 0x7c00) break;
    const float middle = (value + F16ToF32(static_cast<uint16_t>(half + 1))) / 2;
    REQUIRE(F32ToF16(middle) == half + (half & 1));
    REQUIRE(F32ToF16(std::nextafter(middle, 0.0f)) == half);
    REQUIRE(F32ToF16(std::nextafter(middle, 1e9f)) == half + 1);
  }
  REQUIRE(F32ToF16(65519.0f) == 0x7bff);
  REQUIRE(F32ToF16(65520.0f) == 0x7c00);
  REQUIRE(std::isnan(F16ToF32(F32ToF16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST_CASE("bf16 rounds to nearest even and keeps infinities and NaN") {
  REQUIRE(Bf16FromFloat(1.0f) == 0x3f80);
  REQUIRE(Bf16FromFloat(std::bit_cast<float>(0x3f808000u)) == 0x3f80);  // tie to even
  REQUIRE(Bf16FromFloat(std::bit_cast<float>(0x3f818000u)) == 0x3f82);
  REQUIRE(Bf16FromFloat(std::bit_cast<float>(0x3f808001u)) == 0x3f81);
  REQUIRE(Bf16FromFloat(std::numeric_limits<float>::infinity()) == 0x7f80);
  REQUIRE(Bf16FromFloat(std::numeric_limits<float>::max()) == 0x7f80);
  REQUIRE(std::isnan(FloatFromBf16(Bf16FromFloat(std::bit_cast<float>(0x7f800001u)))));

  // The vectorised conversion agrees, NaN included.
  std::vector<float> special = {1.0f,
                                -0.0f,
                                std::bit_cast<float>(0x3f808000u),
                                std::bit_cast<float>(0x7f800001u),
                                std::bit_cast<float>(0xffffffffu),
                                1e-40f,
                                std::numeric_limits<float>::max(),
                                -3.3333f};
  special.insert(special.end(), special.begin(), special.end());
  std::vector<float> q = special;
  std::vector<uint16_t> memory(2 * kBlockTokens * 16, 0);
  const int64_t slot = 0;
  const int32_t position = 0;
  RopeKvParams params;
  params.batch.num_tokens = 1;
  params.batch.slot_mapping = &slot;
  params.batch.positions = &position;
  params.q = TensorView::Contiguous(q.data(), DType::kF32, Device::kCpu, {1, 1, 16});
  params.k = params.v =
      TensorView::Contiguous(special.data(), DType::kF32, Device::kCpu, {1, 1, 16});
  params.kv = {memory.data(), {DType::kBF16, 1, 16}, 1};
  ThreadPool pool(1);
  RopeAppendKv(params, pool);
  for (int i = 0; i < 16; ++i) REQUIRE(memory[i] == Bf16FromFloat(special[i]));
}

}  // namespace gloam::cpu
