#include "kernels/cpu/sidecars/quantize_keys.h"

#include <algorithm>

#include "kernels/cpu/simd_targets.h"
#include "kernels/paged_kv.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sidecars/quantize_keys.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;

template <typename T>
void ConvertFrom(const void* in, int64_t count, float* out) {
  const DF d;
  const hn::Rebind<T, DF> dt;
  const auto* from = static_cast<const T*>(in);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < count; i += lanes) {
    if constexpr (sizeof(T) == sizeof(float)) {
      hn::StoreU(hn::LoadU(d, from + i), d, out + i);
    } else {
      hn::StoreU(hn::PromoteTo(d, hn::LoadU(dt, from + i)), d, out + i);
    }
  }
}

void ConvertToF32Target(const void* in, DType dtype, int64_t count, float* out) {
  switch (dtype) {
    case DType::kBF16:
      return ConvertFrom<hwy::bfloat16_t>(in, count, out);
    case DType::kF16:
      return ConvertFrom<hwy::float16_t>(in, count, out);
    default:  // kF32: the caller has checked
      return ConvertFrom<float>(in, count, out);
  }
}

void ChannelRangesTarget(const float* x, int channels, float* min, float* max) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int c = 0; c < channels; c += lanes) {
    auto low = hn::LoadU(d, x + c);
    auto high = low;
    for (int token = 1; token < kBlockTokens; ++token) {
      const auto value = hn::LoadU(d, x + token * channels + c);
      low = hn::Min(low, value);
      high = hn::Max(high, value);
    }
    hn::StoreU(low, d, min + c);
    hn::StoreU(high, d, max + c);
  }
}

void ChannelMeansTarget(const float* x, int channels, float* mean) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int c = 0; c < channels; c += lanes) {
    auto sum = hn::LoadU(d, x + c);
    for (int token = 1; token < kBlockTokens; ++token) {
      sum = hn::Add(sum, hn::LoadU(d, x + token * channels + c));
    }
    hn::StoreU(hn::Mul(sum, hn::Set(d, 1.0f / kBlockTokens)), d, mean + c);
  }
}

void TokenRangesTarget(const float* x, int channels, float* min, float* max) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int token = 0; token < kBlockTokens; ++token, x += channels) {
    auto low = hn::LoadU(d, x);
    auto high = low;
    for (int c = lanes; c < channels; c += lanes) {
      const auto value = hn::LoadU(d, x + c);
      low = hn::Min(low, value);
      high = hn::Max(high, value);
    }
    min[token] = hn::GetLane(hn::MinOfLanes(d, low));
    max[token] = hn::GetLane(hn::MaxOfLanes(d, high));
  }
}

// clamp(round(value), low, high) + offset, as bytes.
template <typename V>
void StoreQuants(V value, int low, int high, int offset, uint8_t* quants) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const auto clamped = hn::Min(hn::Max(value, hn::Set(d, static_cast<float>(low))),
                               hn::Set(d, static_cast<float>(high)));
  const auto quant = hn::Add(hn::NearestInt(clamped), hn::Set(di, offset));
  hn::StoreU(hn::DemoteTo(d8, quant), d8, quants);
}

// Halves of the keys are subtracted: the range of the largest ones would be infinite.
void QuantizePerChannelTarget(const float* x, int channels, const float* min, const float* max,
                              int levels, uint8_t* quants) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto half = hn::Set(d, 0.5f);
  const auto scale = hn::Set(d, static_cast<float>(levels));
  for (int c = 0; c < channels; c += lanes) {
    const auto low = hn::Mul(hn::LoadU(d, min + c), half);
    const auto range = hn::Sub(hn::Mul(hn::LoadU(d, max + c), half), low);
    const auto empty = hn::Eq(range, hn::Zero(d));
    for (int token = 0; token < kBlockTokens; ++token) {
      const int at = token * channels + c;
      const auto above = hn::Sub(hn::Mul(hn::LoadU(d, x + at), half), low);
      const auto quant = hn::Mul(hn::Div(above, range), scale);
      StoreQuants(hn::IfThenZeroElse(empty, quant), 0, levels, 0, quants + at);
    }
  }
}

void QuantizePerTokenTarget(const float* x, int channels, const TokenQuantizer& quantizer,
                            uint8_t* quants) {
  const DF d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int token = 0; token < kBlockTokens; ++token) {
    const auto base = hn::Set(d, quantizer.base[token]);
    const auto step = hn::Set(d, quantizer.step[token]);
    for (int c = 0; c < channels; c += lanes) {
      const int at = token * channels + c;
      const auto quant = hn::Div(hn::Sub(hn::LoadU(d, x + at), base), step);
      StoreQuants(quant, quantizer.low, quantizer.high, quantizer.offset, quants + at);
    }
  }
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(ConvertToF32Target);
HWY_EXPORT(ChannelRangesTarget);
HWY_EXPORT(ChannelMeansTarget);
HWY_EXPORT(TokenRangesTarget);
HWY_EXPORT(QuantizePerChannelTarget);
HWY_EXPORT(QuantizePerTokenTarget);

void ConvertToF32(const void* in, DType dtype, int64_t count, float* out) {
  GLOAM_CHECK(IsKvDType(dtype, Device::kCpu));
  HWY_DYNAMIC_DISPATCH(ConvertToF32Target)(in, dtype, count, out);
}

void ChannelRanges(const float* x, int channels, float* min, float* max) {
  HWY_DYNAMIC_DISPATCH(ChannelRangesTarget)(x, channels, min, max);
}

void ChannelMeans(const float* x, int channels, float* mean) {
  HWY_DYNAMIC_DISPATCH(ChannelMeansTarget)(x, channels, mean);
}

void TokenRanges(const float* x, int channels, float* min, float* max) {
  HWY_DYNAMIC_DISPATCH(TokenRangesTarget)(x, channels, min, max);
}

void QuantizePerChannel(const float* x, int channels, const float* min, const float* max,
                        int levels, uint8_t* quants) {
  HWY_DYNAMIC_DISPATCH(QuantizePerChannelTarget)(x, channels, min, max, levels, quants);
}

void QuantizePerToken(const float* x, int channels, const TokenQuantizer& quantizer,
                      uint8_t* quants) {
  HWY_DYNAMIC_DISPATCH(QuantizePerTokenTarget)(x, channels, quantizer, quants);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
