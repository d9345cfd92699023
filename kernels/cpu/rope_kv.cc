// Rotary position embedding and the append to the paged cache: one pass over Q, K and V. A token is
// handled by one thread; its result depends on nothing but the token.
#include "kernels/rope_kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/row_tasks.h"
#include "kernels/cpu/simd_targets.h"
#include "kernels/float16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope_kv.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rotates `half` pairs (head[i], head[i + half]) by the angles whose cosines and sines are given.
void RotateNeox(float* head, const float* cos, const float* sin, int half) {
  const auto rotate = [&](auto d, int i) HWY_ATTR {
    const auto x0 = hn::LoadU(d, head + i);
    const auto x1 = hn::LoadU(d, head + half + i);
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::NegMulAdd(x1, s, hn::Mul(x0, c)), d, head + i);
    hn::StoreU(hn::MulAdd(x0, s, hn::Mul(x1, c)), d, head + half + i);
  };
  const hn::CappedTag<float, 16> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= half; i += lanes) rotate(d, i);
  for (; i < half; ++i) rotate(hn::CappedTag<float, 1>(), i);
}

// The same with pairs (head[2i], head[2i + 1]).
void RotateInterleaved(float* head, const float* cos, const float* sin, int half) {
  const hn::CappedTag<float, 16> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  int i = 0;
  for (; i + lanes <= half; i += lanes) {
    hn::Vec<decltype(d)> x0, x1;
    hn::LoadInterleaved2(d, head + 2 * i, x0, x1);
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    hn::StoreInterleaved2(hn::NegMulAdd(x1, s, hn::Mul(x0, c)), hn::MulAdd(x0, s, hn::Mul(x1, c)),
                          d, head + 2 * i);
  }
  for (; i < half; ++i) {
    const float x0 = head[2 * i];
    const float x1 = head[2 * i + 1];
    head[2 * i] = x0 * cos[i] - x1 * sin[i];
    head[2 * i + 1] = x1 * cos[i] + x0 * sin[i];
  }
}

// Rounds to nearest, ties to even, as Bf16FromFloat does.
void ConvertToBf16(const float* from, int count, uint16_t* to) {
  const hn::CappedTag<float, 16> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint16_t, decltype(df)> dh;
  const int lanes = static_cast<int>(hn::Lanes(df));
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::LoadU(df, from + i);
    const auto bits = hn::BitCast(du, value);
    const auto high = hn::ShiftRight<16>(bits);
    const auto odd = hn::And(high, hn::Set(du, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
    const auto is_nan = hn::RebindMask(du, hn::IsNaN(value));
    const auto result = hn::IfThenElse(is_nan, hn::Or(high, hn::Set(du, 0x40)), rounded);
    hn::StoreU(hn::DemoteTo(dh, hn::BitCast(di, result)), dh, to + i);
  }
  for (; i < count; ++i) to[i] = Bf16FromFloat(from[i]);
}

constexpr float kMaxF16 = 65504.0f;

// Rounds to nearest, ties to even. What lies past the largest fp16 becomes the largest: infinity in
// a key or a value would make a whole answer NaN.
void ConvertToF16(const float* from, int count, uint16_t* to) {
  const hn::CappedTag<float, 16> df;
  const hn::Rebind<hwy::float16_t, decltype(df)> dh;
  const int lanes = static_cast<int>(hn::Lanes(df));
  auto* out = reinterpret_cast<hwy::float16_t*>(to);
  int i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::LoadU(df, from + i);
    const auto clamped = hn::Max(hn::Min(value, hn::Set(df, kMaxF16)), hn::Set(df, -kMaxF16));
    const auto kept = hn::IfThenElse(hn::IsNaN(value), value, clamped);
    hn::StoreU(hn::DemoteTo(dh, kept), dh, out + i);
  }
  for (; i < count; ++i) {
    to[i] = F32ToF16(std::isnan(from[i]) ? from[i] : std::clamp(from[i], -kMaxF16, kMaxF16));
  }
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(RotateNeox);
HWY_EXPORT(RotateInterleaved);
HWY_EXPORT(ConvertToBf16);
HWY_EXPORT(ConvertToF16);

namespace {

// Elements of Q, K and V that one thread handles in about 5 us, the slots being in no cache.
constexpr int64_t kGrainElements = 1 << 12;

void CheckParams(const RopeKvParams& params) {
  const int64_t num_tokens = params.batch.num_tokens;
  const KvLayout& layout = params.kv.layout;
  GLOAM_CHECK(params.q.rank == 3 && params.k.rank == 3 && params.v.rank == 3);
  GLOAM_CHECK(params.q_out.data == nullptr || params.q_out.data == params.q.data);
  GLOAM_CHECK(params.q.shape[0] == num_tokens && params.q.shape[2] == layout.head_dim);
  GLOAM_CHECK(params.k.shape[0] == num_tokens && params.k.shape[1] == layout.num_kv_heads &&
              params.k.shape[2] == layout.head_dim);
  GLOAM_CHECK(params.v.shape == params.k.shape);
  GLOAM_CHECK(IsKvDType(layout.dtype, Device::kCpu));
  GLOAM_CHECK(params.rotary_dim >= 0 && params.rotary_dim % 2 == 0 &&
              params.rotary_dim <= layout.head_dim);
}

float* HeadOf(const TensorView& x, int64_t token, int64_t head) {
  return static_cast<float*>(x.data) + token * x.strides[0] + head * x.strides[1];
}

void StoreHead(const float* from, DType dtype, int head_dim, void* to) {
  switch (dtype) {
    case DType::kBF16:
      return HWY_DYNAMIC_DISPATCH(ConvertToBf16)(from, head_dim, static_cast<uint16_t*>(to));
    case DType::kF16:
      return HWY_DYNAMIC_DISPATCH(ConvertToF16)(from, head_dim, static_cast<uint16_t*>(to));
    default:  // kF32: CheckParams has seen to it
      std::memcpy(to, from, static_cast<size_t>(head_dim) * sizeof(float));
  }
}

void AppendToken(const RopeKvParams& params, int64_t token) {
  const KvLayout& layout = params.kv.layout;
  const int64_t slot = params.batch.slot_mapping[token];
  GLOAM_CHECK(slot >= 0 && slot < params.kv.num_blocks * kBlockTokens);
  const int64_t block = slot / kBlockTokens;
  const int64_t element_bytes = static_cast<int64_t>(DTypeBytes(layout.dtype));
  const int64_t offset_bytes = slot % kBlockTokens * layout.head_dim * element_bytes;
  const int64_t run_bytes = layout.head_run_elements() * element_bytes;
  char* keys = static_cast<char*>(params.kv.data) + block * layout.block_bytes() + offset_bytes;
  char* values = keys + layout.num_kv_heads * run_bytes;
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    StoreHead(HeadOf(params.k, token, head), layout.dtype, layout.head_dim,
              keys + head * run_bytes);
    StoreHead(HeadOf(params.v, token, head), layout.dtype, layout.head_dim,
              values + head * run_bytes);
  }
}

}  // namespace

void RopeAppendKv(const RopeKvParams& params, ThreadPool& pool) {
  CheckParams(params);
  const int64_t num_heads = params.q.shape[1];
  const int64_t num_kv_heads = params.kv.layout.num_kv_heads;
  const int half = params.rotary_dim / 2;
  const auto rotate = params.style == RopeStyle::kNeox ? HWY_DYNAMIC_DISPATCH(RotateNeox)
                                                       : HWY_DYNAMIC_DISPATCH(RotateInterleaved);
  const int64_t row_elements = (num_heads + 2 * num_kv_heads) * params.kv.layout.head_dim;
  ForRows(pool, params.batch.num_tokens, row_elements, kGrainElements,
          [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
              if (half > 0) {
                const int64_t row = int64_t{params.batch.positions[token]} * half;
                const float* cos = params.cos + row;
                const float* sin = params.sin + row;
                for (int64_t h = 0; h < num_heads; ++h) {
                  rotate(HeadOf(params.q, token, h), cos, sin, half);
                }
                for (int64_t h = 0; h < num_kv_heads; ++h) {
                  rotate(HeadOf(params.k, token, h), cos, sin, half);
                }
              }
              AppendToken(params, token);
            }
          });
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
