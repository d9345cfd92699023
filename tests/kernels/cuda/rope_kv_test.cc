// RopeAppendKv on the GPU: rotated values rounded to the cache's types bit for bit, the CPU twin,
// padding, and memory that must stay untouched.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cache_values.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 12;
constexpr int64_t kNumBlocks = 40;
constexpr int kMaxPositions = 300;

struct Shape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int rotary_dim;
  RopeStyle style;
  DType dtype;
  int64_t offset;  // of the fused rows' start and between them, in elements
  bool from_bf16 = false;
};

// Bytes of one value in the type of a cache or of its queries.
std::vector<uint8_t> Encode(DType dtype, float value) {
  if (dtype == DType::kF16 && !std::isnan(value)) value = std::clamp(value, -65504.0f, 65504.0f);
  return ToBytes(dtype, std::span(&value, 1));
}

// One head, rotated with the same two roundings per channel as the kernels.
std::vector<float> Rotated(const float* head, const Shape& shape, const float* cos,
                           const float* sin) {
  std::vector<float> out(head, head + shape.head_dim);
  const int half = shape.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const int a = shape.style == RopeStyle::kNeox ? i : 2 * i;
    const int b = shape.style == RopeStyle::kNeox ? half + i : 2 * i + 1;
    out[a] = std::fma(-head[b], sin[i], head[a] * cos[i]);
    out[b] = std::fma(head[a], sin[i], head[b] * cos[i]);
  }
  return out;
}

struct Case {
  Case(const Shape& shape, int num_tokens, std::mt19937& rng)
      : shape(shape),
        num_tokens(num_tokens),
        width(int64_t{shape.num_heads + 2 * shape.num_kv_heads} * shape.head_dim + shape.offset) {
    std::normal_distribution<float> normal(0, 3);
    qkv.resize(num_tokens * width + shape.offset);
    for (float& x : qkv) x = normal(rng);
    const float extremes[] = {1e6f, -1e6f, 1e-7f, 470.0f, -65520.0f, 1e-9f};
    for (size_t i = 0; i < std::size(extremes); ++i) qkv[rng() % qkv.size()] = extremes[i];
    if (shape.from_bf16) qkv = ToFloat(DType::kBF16, RoundTo(DType::kBF16, qkv));
    const int half = shape.rotary_dim / 2;
    for (int position = 0; position < kMaxPositions; ++position) {
      for (int i = 0; i < half; ++i) {
        const double angle = position * std::pow(1e4, -static_cast<double>(i) / half);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    std::vector<int64_t> slots(kNumBlocks * kBlockTokens);
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
    std::shuffle(slots.begin(), slots.end(), rng);
    for (int i = 0; i < num_tokens; ++i) {
      positions.push_back(static_cast<int32_t>(rng() % kMaxPositions));
      slot_mapping.push_back(i % 5 == 4 ? -1 : slots[i]);
    }
    layout = {.dtype = shape.dtype, .num_kv_heads = shape.num_kv_heads, .head_dim = shape.head_dim};
  }

  DType query_dtype() const { return QueryDTypeOf(shape.dtype); }
  const float* Head(int64_t token, int head) const {
    return &qkv[shape.offset + token * width + int64_t{head} * shape.head_dim];
  }

  TensorView Heads(float* data, Device device, int first, int count) const {
    return Heads(data + At(first), DType::kF32, device, count);
  }
  TensorView Heads(uint16_t* data, Device device, int first, int count) const {
    return Heads(data + At(first), DType::kBF16, device, count);
  }
  int64_t At(int head) const { return shape.offset + int64_t{head} * shape.head_dim; }
  TensorView Heads(void* first, DType dtype, Device device, int count) const {
    TensorView view =
        TensorView::Contiguous(first, dtype, device, {num_tokens, count, shape.head_dim});
    view.strides[0] = width;
    return view;
  }

  Shape shape;
  int num_tokens;
  int64_t width;
  std::vector<float> qkv, cos, sin;
  std::vector<int32_t> positions;
  std::vector<int64_t> slot_mapping;
  KvLayout layout;
};

struct Outcome {
  std::vector<uint8_t> q;      // bytes of [num_tokens, num_heads, head_dim], rows padded by 8
  std::vector<uint8_t> cache;  // bytes
};

// T: float, or uint16_t for bf16.
template <typename T>
Outcome RunFrom(const Case& c, const DeviceArray<T>& qkv, const CudaFixture& fixture) {
  const DeviceArray<float> cos(c.cos), sin(c.sin);
  const DeviceArray<int32_t> positions(c.positions);
  const DeviceArray<int64_t> slots(c.slot_mapping);
  const int64_t q_stride = int64_t{c.shape.num_heads} * c.shape.head_dim + 8;
  const DeviceArray<uint8_t> q_out(2 * c.num_tokens * q_stride);
  const DeviceArray<uint8_t> cache(kNumBlocks * c.layout.block_bytes());
  RopeKvParams params;
  params.batch.num_tokens = c.num_tokens;
  params.batch.positions = positions.data();
  params.batch.slot_mapping = slots.data();
  params.q = c.Heads(qkv.data(), Device::kCuda, 0, c.shape.num_heads);
  params.k = c.Heads(qkv.data(), Device::kCuda, c.shape.num_heads, c.shape.num_kv_heads);
  params.v = c.Heads(qkv.data(), Device::kCuda, c.shape.num_heads + c.shape.num_kv_heads,
                     c.shape.num_kv_heads);
  params.q_out = TensorView::Contiguous(q_out.data(), c.query_dtype(), Device::kCuda,
                                        {c.num_tokens, c.shape.num_heads, c.shape.head_dim});
  params.q_out.strides[0] = q_stride;
  params.cos = cos.data();
  params.sin = sin.data();
  params.rotary_dim = c.shape.rotary_dim;
  params.style = c.shape.style;
  params.kv = {cache.data(), c.layout, kNumBlocks};
  RopeAppendKv(params, fixture.context);
  return {q_out.Download(), cache.Download()};
}

Outcome RunCuda(const Case& c, const CudaFixture& fixture) {
  if (!c.shape.from_bf16) return RunFrom(c, DeviceArray<float>(c.qkv), fixture);
  return RunFrom(c, DeviceArray<uint16_t>(RoundTo(DType::kBF16, c.qkv)), fixture);
}

Outcome Expected(const Case& c) {
  const int64_t q_stride = int64_t{c.shape.num_heads} * c.shape.head_dim + 8;
  Outcome out;
  out.q.assign(2 * c.num_tokens * q_stride, 0xFF);
  out.cache.assign(kNumBlocks * c.layout.block_bytes(), 0xFF);
  const int half = c.shape.rotary_dim / 2;
  const auto put = [](DType dtype, const std::vector<float>& values, uint8_t* to) {
    for (const float value : values) {
      for (const uint8_t byte : Encode(dtype, value)) *to++ = byte;
    }
  };
  for (int token = 0; token < c.num_tokens; ++token) {
    const float* cos = c.cos.data() + int64_t{c.positions[token]} * half;
    const float* sin = c.sin.data() + int64_t{c.positions[token]} * half;
    for (int head = 0; head < c.shape.num_heads; ++head) {
      put(c.query_dtype(), Rotated(c.Head(token, head), c.shape, cos, sin),
          &out.q[2 * (token * q_stride + head * c.shape.head_dim)]);
    }
    const int64_t slot = c.slot_mapping[token];
    if (slot < 0) continue;
    for (int head = 0; head < c.shape.num_kv_heads; ++head) {
      const float* k = c.Head(token, c.shape.num_heads + head);
      const float* v = c.Head(token, c.shape.num_heads + c.shape.num_kv_heads + head);
      const int64_t bytes = static_cast<int64_t>(DTypeBytes(c.shape.dtype));
      const int64_t in_run = slot % kBlockTokens * c.shape.head_dim * bytes;
      const auto run = [&](int64_t block_part) {
        return out.cache.data() +
               (slot / kBlockTokens * c.layout.block_elements() +
                block_part * c.layout.head_run_elements()) *
                   bytes +
               in_run;
      };
      put(c.shape.dtype, Rotated(k, c.shape, cos, sin), run(head));
      put(c.shape.dtype, std::vector<float>(v, v + c.shape.head_dim),
          run(c.shape.num_kv_heads + head));
    }
  }
  return out;
}

int64_t CountDifferent(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
  REQUIRE(a.size() == b.size());
  int64_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different += a[i] != b[i] ? 1 : 0;
  return different;
}

}  // namespace

TEST_CASE("RopeAppendKv writes rotated values rounded to the cache's type, and nothing else") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  const std::vector<Shape> heads = {{32, 8, 128, 128}, {9, 3, 64, 64}, {14, 2, 64, 32},
                                    {6, 6, 80, 80},    {5, 1, 96, 24}, {3, 1, 128, 0},
                                    {2, 2, 36, 20},    {4, 4, 256, 64}};
  for (Shape shape : heads) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
      for (const RopeStyle style : {RopeStyle::kNeox, RopeStyle::kInterleaved}) {
        for (const int64_t offset : {0, 8, 3}) {
          for (const int num_tokens : {1, 7, 130}) {
            shape.dtype = dtype;
            shape.style = style;
            shape.offset = offset;
            shape.from_bf16 = !shape.from_bf16;
            CAPTURE(shape.from_bf16);
            CAPTURE(shape.num_heads, shape.head_dim, shape.rotary_dim, dtype, style, offset,
                    num_tokens);
            const Case c(shape, num_tokens, rng);
            const Outcome got = RunCuda(c, fixture), expected = Expected(c);
            REQUIRE(CountDifferent(got.q, expected.q) == 0);
            REQUIRE(CountDifferent(got.cache, expected.cache) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("RopeAppendKv agrees with the CPU twin") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  const std::unique_ptr<Ops> cpu = MakeCpuOps({.num_threads = 1});
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const RopeStyle style : {RopeStyle::kNeox, RopeStyle::kInterleaved}) {
      CAPTURE(dtype, style);
      Case c({8, 2, 128, 96, style, dtype, 0}, 100, rng);
      for (size_t i = 0; i < c.slot_mapping.size(); ++i) {  // the CPU takes no padding
        if (c.slot_mapping[i] < 0) c.slot_mapping[i] = static_cast<int64_t>(600 + i / 5);
      }
      std::vector<int64_t> slots = c.slot_mapping;
      std::sort(slots.begin(), slots.end());
      slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
      if (slots.size() != c.slot_mapping.size()) {
        for (size_t i = 0; i < c.slot_mapping.size(); ++i) c.slot_mapping[i] = 3 * i;
      }
      const Outcome got = RunCuda(c, fixture);
      std::vector<float> qkv = c.qkv;
      std::vector<uint8_t> cache(kNumBlocks * c.layout.block_bytes(), 0xFF);
      RopeKvParams params;
      params.batch.num_tokens = c.num_tokens;
      params.batch.positions = c.positions.data();
      params.batch.slot_mapping = c.slot_mapping.data();
      params.q = c.Heads(qkv.data(), Device::kCpu, 0, 8);
      params.k = c.Heads(qkv.data(), Device::kCpu, 8, 2);
      params.v = c.Heads(qkv.data(), Device::kCpu, 10, 2);
      params.cos = c.cos.data();
      params.sin = c.sin.data();
      params.rotary_dim = c.shape.rotary_dim;
      params.style = style;
      params.kv = {cache.data(), c.layout, kNumBlocks};
      cpu->RopeAppendKv(params);
      // Where the CPU has no fused multiply-add a value may fall on the other side of a rounding.
      const auto to_floats = [&](const std::vector<uint8_t>& bytes) {
        std::vector<uint16_t> bits(bytes.size() / 2);
        std::memcpy(bits.data(), bytes.data(), bytes.size());
        return ToFloat(dtype, bits);
      };
      const std::vector<float> a = to_floats(got.cache), b = to_floats(cache);
      int wrong = 0;
      for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) && std::isnan(b[i])) continue;
        const float ulp = dtype == DType::kBF16 ? 0x1p-7f : 0x1p-10f;
        if (!(std::abs(a[i] - b[i]) <= ulp * std::abs(b[i]) + 1e-6f)) ++wrong;
      }
      REQUIRE(wrong == 0);
    }
  }
}

}  // namespace gloam::cuda
