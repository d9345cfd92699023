// Weights as integers, once per instruction set, so that every instruction set computes the same.
//
// A block of quants n[token][c] (quant_rows.h) and weights w[c] about scale * m[c] with integers m:
//   sum_c w[c] * n[token][c]  ~  scale * sum_c m[c] * (n[token][c] - centre) + centre * sum_c w[c]
// with the centre in the middle of the quants' range, which halves what the rounding of w can do.
// For quants per channel w = query * step differs from block to block, and so do its integers; one
// plane of seven bits and a sign holds them. For quants per token w is the query, rounded once to
// two planes; the token's scale and minimum come after the sum.
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/estimate/heads-inl.h"
#include "kernels/cpu/estimate/integer_weights.h"
#include "kernels/paged_kv.h"

#if defined(GLOAM_ESTIMATE_WEIGHTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ESTIMATE_WEIGHTS_INL_H
#undef GLOAM_ESTIMATE_WEIGHTS_INL_H
#else
#define GLOAM_ESTIMATE_WEIGHTS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

static_assert(kBlockTokens == kNeighbours);

// Below this the largest weight of a head counts as this: its inverse stays finite.
constexpr float kSmallestWeight = 1e-30f;

// Added to a float of at most 2^22 it leaves the nearest integer, ties to even, in the low bits.
constexpr float kRoundingBias = 0x1.8p23f;

template <int kPlanes>
constexpr float kLargestInteger = kPlanes == 1 ? 127.0f : 127.0f * 128.0f;

// What is known of some heads' weights after a first pass over the channels.
struct WeightSums {
  alignas(16) float largest[kTileHeads];             // of |weight|
  alignas(64) float mids[kTileHeads][kBlockTokens];  // query * mid, sums by channel modulo 16
};

// Weights at a time whose bytes are packed in registers.
constexpr int kPackedWeights = 64;

inline void StoreWeights(VI weights, int8_t* out) {
  const hn::Rebind<int8_t, DF> d8;
  hn::Store(hn::DemoteTo(d8, weights), d8, out);
}

// Stores floats that the bias has rounded as int8: their low bytes.
inline void StoreBiased(const VF (&biased)[kPackedWeights / kLanes], int8_t* out) {
#if HWY_TARGET == HWY_AVX3
  const auto low = [&](int i) HWY_ATTR {
    return hn::And(hn::BitCast(di, biased[i]), hn::Set(di, 0xff)).raw;
  };
  // Per 128-bit block a quarter of each vector.
  const __m512i quarters =
      _mm512_packus_epi16(_mm512_packus_epi32(low(0), low(1)), _mm512_packus_epi32(low(2), low(3)));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_store_si512(out, _mm512_permutexvar_epi32(order, quarters));
#elif HWY_TARGET == HWY_AVX2
  const auto low = [&](int i) HWY_ATTR {
    return hn::And(hn::BitCast(di, biased[i]), hn::Set(di, 0xff)).raw;
  };
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  GLOAM_UNROLL
  for (int i = 0; i < 8; i += 4) {
    // Per 128-bit block a half of each vector.
    const __m256i halves = _mm256_packus_epi16(_mm256_packus_epi32(low(i), low(i + 1)),
                                               _mm256_packus_epi32(low(i + 2), low(i + 3)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * kLanes),
                       _mm256_permutevar8x32_epi32(halves, order));
  }
#else
  const VI bias = hn::BitCast(di, hn::Set(df, kRoundingBias));
  for (int i = 0; i < kPackedWeights / kLanes; ++i) {
    StoreWeights(hn::Sub(hn::BitCast(di, biased[i]), bias), out + i * kLanes);
  }
#endif
}

// One head's weights queries[c] * steps[c] as integers. `sums`: of the integers by channel modulo
// 16.
template <int kPlanes>
HWY_INLINE void RoundHead(const float* queries, int channels, const float* steps, float inverse,
                          int8_t (&planes)[2][kMaxSidecarHeadDim], VF (&sums)[kStrips]) {
  const VF bias = hn::Set(df, kRoundingBias);
  const VI bias_bits = hn::BitCast(di, bias);
  const VF factor = hn::Set(df, inverse);
  const auto round = [&](int c) HWY_ATTR {
    return hn::Add(hn::Mul(hn::Mul(hn::LoadU(df, queries + c), hn::Load(df, steps + c)), factor),
                   bias);
  };
  VI integers[kStrips];
  GLOAM_UNROLL
  for (int s = 0; s < kStrips; ++s) integers[s] = hn::Zero(di);
  int c = 0;
  if constexpr (kPlanes == 1) {
    for (; c + kPackedWeights <= channels; c += kPackedWeights) {
      VF biased[kPackedWeights / kLanes];
      GLOAM_UNROLL
      for (int i = 0; i < kPackedWeights / kLanes; ++i) {
        biased[i] = round(c + i * kLanes);
        VI& sum = integers[i % kStrips];
        sum = hn::Add(sum, hn::Sub(hn::BitCast(di, biased[i]), bias_bits));
      }
      StoreBiased(biased, planes[0] + c);
    }
  }
  for (; c < channels; c += kBlockTokens) {
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      const int at = c + s * kLanes;
      const VI integer = hn::Sub(hn::BitCast(di, round(at)), bias_bits);
      integers[s] = hn::Add(integers[s], integer);
      if constexpr (kPlanes == 1) {
        StoreWeights(integer, planes[0] + at);
      } else {
        const VI high = hn::ShiftRight<7>(hn::Add(integer, hn::Set(di, 64)));
        StoreWeights(high, planes[0] + at);
        StoreWeights(hn::Sub(integer, hn::ShiftLeft<7>(high)), planes[1] + at);
      }
    }
  }
  GLOAM_UNROLL
  for (int s = 0; s < kStrips; ++s) sums[s] = hn::ConvertTo(df, integers[s]);
}

// First pass: weights are queries[h][c] * steps[c]. No fused multiply-adds here and below: not
// every target has them.
template <int kHeads>
HWY_INLINE void SumWeights(const float* queries, int channels, const float* steps,
                           const float* mids, WeightSums& out) {
  VF largest[4][kStrips], sums[kHeads][kStrips];
  GLOAM_UNROLL
  for (int h = 0; h < 4; ++h) {
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) largest[h][s] = hn::Zero(df);
  }
  GLOAM_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) sums[h][s] = hn::Zero(df);
  }
  for (int c = 0; c < channels; c += kBlockTokens) {
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      const int at = c + s * kLanes;
      const VF step = hn::Load(df, steps + at);
      const VF mid = hn::Load(df, mids + at);
      GLOAM_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const VF q = hn::LoadU(df, queries + h * channels + at);
        largest[h][s] = hn::Max(largest[h][s], hn::Abs(hn::Mul(q, step)));
        sums[h][s] = hn::Add(sums[h][s], hn::Mul(q, mid));
      }
    }
  }
  FoldFour(MaxOp(), largest, out.largest);
  GLOAM_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) hn::Store(sums[h][s], df, out.mids[h] + s * kLanes);
  }
}

// Second pass: the weights as integers, and the constants sum_c queries[h][c] * mids[c] - centre *
// (what the integers sum to).
template <int kHeads, int kPlanes>
HWY_INLINE void RoundWeights(const float* queries, int channels, const float* steps,
                             const WeightSums& sums, float centre, IntegerWeights& out) {
  alignas(16) float inverses[kTileHeads];
  const hn::CappedTag<float, kTileHeads> d4;
  for (int h = 0; h < kTileHeads; h += static_cast<int>(hn::MaxLanes(d4))) {
    const auto most = hn::Max(hn::Load(d4, sums.largest + h), hn::Set(d4, kSmallestWeight));
    hn::Store(hn::Mul(most, hn::Set(d4, 1.0f / kLargestInteger<kPlanes>)), d4, out.scales + h);
    hn::Store(hn::Div(hn::Set(d4, kLargestInteger<kPlanes>), most), d4, inverses + h);
  }
  VF integers[kHeads][kStrips];
  GLOAM_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    RoundHead<kPlanes>(queries + h * channels, channels, steps, inverses[h], out.planes[h],
                       integers[h]);
  }
  VF constants[4][kStrips];
  GLOAM_UNROLL
  for (int h = 0; h < 4; ++h) {
    const VF factor = hn::Set(df, centre * out.scales[h]);
    GLOAM_UNROLL
    for (int s = 0; s < kStrips; ++s) {
      constants[h][s] = hn::Zero(df);
      if (h < kHeads) {
        const VF mids = hn::Load(df, sums.mids[h] + s * kLanes);
        constants[h][s] = hn::Sub(mids, hn::Mul(factor, integers[h][s]));
      }
    }
  }
  FoldFour(AddOp(), constants, out.constants);
}

// The middle of the quants' range.
constexpr float CentreOf(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
