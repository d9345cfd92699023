// Logits from mirrors of the keys: integer dot products of the quants with weights w that are
// rounded to integers as well, so that every instruction set computes the same.
//
// A block of quants n[token][c] (quant_rows.h) and weights w[c] about scale * m[c] with integers m:
//   sum_c w[c] * n[token][c]  ~  scale * sum_c m[c] * (n[token][c] - centre) + centre * sum_c w[c]
// with the centre in the middle of the quants' range, which halves what the rounding of w can do.
// For quants per channel w = query * step differs from block to block, and so do its integers; one
// plane of seven bits and a sign holds them. For quants per token w is the query, rounded once to
// two planes; the token's scale and minimum come after the sum.
//
// Per block and head of 64 channels at 4 bits: 768 bytes (bf16 ranges) read once for all heads,
// 1,024 multiply-adds a head.
#include "kernels/cpu/sparse/estimate_kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/sidecars/quant_rows.h"
#include "kernels/cpu/sparse/candidate_blocks.h"
#include "kernels/estimate.h"
#include "kernels/float16.h"

// Scalable vectors cannot be array elements, which the register tiles need.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sparse/estimate_kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/vectors-inl.h"

#ifndef GLOAM_ESTIMATE_ONCE
#define GLOAM_ESTIMATE_ONCE
namespace gloam::cpu {

// Query heads that are computed together: their sums fit the registers.
constexpr int kTileHeads = 4;

// Integer weights of up to kTileHeads heads.
struct IntegerWeights {
  alignas(64) int8_t planes[kTileHeads][2][kMaxSidecarHeadDim];  // m, or m / 128 and the rest
  alignas(16) float scales[kTileHeads];
  alignas(16) float constants[kTileHeads];
};

inline std::atomic<bool> estimate_vnni_disabled{false};

}  // namespace gloam::cpu
#endif  // GLOAM_ESTIMATE_ONCE

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

static_assert(kBlockTokens == kNeighbours);

// ---- Dot products of four quants (at most 15) and four signed weights per lane, exact ---------
//
// sum = MulAdd(sum, ...) up to kQuadsPerTotal times from zero, then Total(sum) as int32.

// As many pairs of products, each at most 2 * 15 * 127, fit an int16.
constexpr int kQuadsPerTotal = 8;

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || !HWY_ARCH_X86

struct Dot {
  static VI MulAdd(VI sum, VU quads, const int8_t* weights) {
    HWY_UNROLL(4)
    for (int i = 0; i < 4; ++i, quads = hn::ShiftRight<8>(quads)) {
      const VI quant = hn::BitCast(di, hn::And(quads, hn::Set(du, 0xff)));
      sum = hn::Add(sum, hn::Mul(quant, hn::Set(di, weights[i])));
    }
    return sum;
  }
  static VI Total(VI sum) { return sum; }
};

#else

// Sums stay in pairs of int16 until Total.
struct Dot {
  static VI MulAdd(VI sum, VU quads, const int8_t* weights) {
    constexpr hn::Repartition<int16_t, DI> d16;
    const VI pairs = VI{MulPairs(quads.raw, BroadcastFour(weights).raw)};
    return InOrder(hn::BitCast(di, hn::Add(hn::BitCast(d16, sum), hn::BitCast(d16, pairs))));
  }
  static VI Total(VI sum) { return VI{AddPairs(sum.raw, hn::Set(di, 0x00010001).raw)}; }
};

#endif

#if HWY_TARGET == HWY_AVX3
// As an asm statement because Highway 1.0.3 has no target with AVX512-VNNI but without AVX-VNNI,
// which the compiler could then use on hosts that lack it.
struct DotVnni {
  static VI MulAdd(VI sum, VU quads, const int8_t* weights) {
    const auto* four = reinterpret_cast<const int32_t*>(weights);
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(quads.raw), "m"(*four));
    return sum;
  }
  static VI Total(VI sum) { return sum; }
};

bool UseVnni() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni && !estimate_vnni_disabled.load(std::memory_order_relaxed);
}
#endif

// ---- Sums over channels ----------------------------------------------------------------------

// out[i] = the fold of the N * kLanes values x[i][*], in an order that does not depend on kLanes:
// of four neighbours (0, 2) and (1, 3), then the fours in ascending order.
template <int N, typename Op>
HWY_INLINE void FoldFour(const Op& op, const VF (&x)[4][N], float* out) {
  constexpr int kFours = N * kLanes / 4;
  alignas(64) float fours[kFours][4];
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) {
    for (int at = 0; at < kFours; ++at) {
      const VF* v = x[i] + 4 * at;
      fours[at][i] = hn::GetLane(op(op(v[0], v[2]), op(v[1], v[3])));
    }
  }
  for (int i = 0; i < 4; ++i) {
    VF total = hn::Set(df, fours[0][i]);
    for (int at = 1; at < kFours; ++at) total = op(total, hn::Set(df, fours[at][i]));
    out[i] = hn::GetLane(total);
  }
#else
  const hn::Repartition<uint64_t, DF> d64;
  HWY_UNROLL(4)
  for (int s = 0; s < N; ++s) {
    const auto pair = [&](VF a, VF b) HWY_ATTR {
      return hn::BitCast(d64, op(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b)));
    };
    const auto ab = pair(x[0][s], x[1][s]);
    const auto cd = pair(x[2][s], x[3][s]);
    const VF abcd = op(hn::BitCast(df, hn::InterleaveLower(d64, ab, cd)),
                       hn::BitCast(df, hn::InterleaveUpper(d64, ab, cd)));
    hn::Store(abcd, df, fours[s * kLanes / 4]);
  }
  const hn::CappedTag<float, 4> d4;
  auto total = hn::Load(d4, fours[0]);
  HWY_UNROLL(4)
  for (int at = 1; at < kFours; ++at) total = op(total, hn::Load(d4, fours[at]));
  hn::StoreU(total, d4, out);
#endif
}

struct AddOp {
  template <typename V>
  V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};
struct MaxOp {
  template <typename V>
  V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

// ---- Weights ---------------------------------------------------------------------------------

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
  HWY_UNROLL(2)
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
  HWY_UNROLL(4)
  for (int s = 0; s < kStrips; ++s) integers[s] = hn::Zero(di);
  int c = 0;
  if constexpr (kPlanes == 1) {
    for (; c + kPackedWeights <= channels; c += kPackedWeights) {
      VF biased[kPackedWeights / kLanes];
      HWY_UNROLL(16)
      for (int i = 0; i < kPackedWeights / kLanes; ++i) {
        biased[i] = round(c + i * kLanes);
        VI& sum = integers[i % kStrips];
        sum = hn::Add(sum, hn::Sub(hn::BitCast(di, biased[i]), bias_bits));
      }
      StoreBiased(biased, planes[0] + c);
    }
  }
  for (; c < channels; c += kBlockTokens) {
    HWY_UNROLL(4)
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
  HWY_UNROLL(4)
  for (int s = 0; s < kStrips; ++s) sums[s] = hn::ConvertTo(df, integers[s]);
}

// First pass: weights are queries[h][c] * steps[c]. No fused multiply-adds here and below: not
// every target has them.
template <int kHeads>
HWY_INLINE void SumWeights(const float* queries, int channels, const float* steps,
                           const float* mids, WeightSums& out) {
  VF largest[4][kStrips], sums[kHeads][kStrips];
  HWY_UNROLL(4)
  for (int h = 0; h < 4; ++h) {
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) largest[h][s] = hn::Zero(df);
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) sums[h][s] = hn::Zero(df);
  }
  for (int c = 0; c < channels; c += kBlockTokens) {
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) {
      const int at = c + s * kLanes;
      const VF step = hn::Load(df, steps + at);
      const VF mid = hn::Load(df, mids + at);
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) {
        const VF q = hn::LoadU(df, queries + h * channels + at);
        largest[h][s] = hn::Max(largest[h][s], hn::Abs(hn::Mul(q, step)));
        sums[h][s] = hn::Add(sums[h][s], hn::Mul(q, mid));
      }
    }
  }
  FoldFour(MaxOp(), largest, out.largest);
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(4)
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
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    RoundHead<kPlanes>(queries + h * channels, channels, steps, inverses[h], out.planes[h],
                       integers[h]);
  }
  VF constants[4][kStrips];
  HWY_UNROLL(4)
  for (int h = 0; h < 4; ++h) {
    const VF factor = hn::Set(df, centre * out.scales[h]);
    HWY_UNROLL(4)
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

// ---- Products --------------------------------------------------------------------------------

// Steps and middles of a block's channels from its ranges.
template <typename T>
void LoadRanges(const std::byte* ranges, int head_dim, int bits, float* steps, float* mids) {
  const hn::Rebind<T, DF> dt;
  const auto* min = reinterpret_cast<const T*>(ranges);
  const VF half = hn::Set(df, 0.5f);
  const VF factor = hn::Set(df, 2.0f / static_cast<float>((1 << bits) - 1));
  const auto load = [&](const T* from) HWY_ATTR {
    if constexpr (sizeof(T) == sizeof(float)) {
      return hn::Mul(hn::LoadU(df, from), half);
    } else {
      return hn::Mul(hn::PromoteTo(df, hn::LoadU(dt, from)), half);
    }
  };
  for (int c = 0; c < head_dim; c += kLanes) {
    const VF low = load(min + c);
    const VF high = load(min + head_dim + c);
    hn::Store(hn::Mul(hn::Sub(high, low), factor), df, steps + c);
    hn::Store(hn::Add(high, low), df, mids + c);
  }
}

// What becomes of the sums of kHeads heads.
struct StoreLogits {
  const IntegerWeights* weights;
  float* logits;  // of the first head; heads follow at `stride`
  int64_t stride;

  void operator()(int h, int strip, VF dot) const {
    const VF scale = hn::Set(df, weights->scales[h]);
    const VF constant = hn::Set(df, weights->constants[h]);
    hn::StoreU(hn::Add(hn::Mul(dot, scale), constant), df, logits + h * stride + strip * kLanes);
  }
};

// The same with a scale and, if any, a minimum per token.
struct StoreTokenLogits {
  StoreLogits out;
  const float* token_scales;   // [16]
  const float* token_minima;   // [16]; zeros when symmetric
  const float* query_sums;     // [kTileHeads]
  const float* query_offsets;  // [kTileHeads] taken from the sum before the token's scale

  void operator()(int h, int strip, VF dot) const {
    const VF constant = hn::Set(df, out.weights->constants[h] - query_offsets[h]);
    const VF sum = hn::Add(hn::Mul(dot, hn::Set(df, out.weights->scales[h])), constant);
    const VF scaled = hn::Mul(sum, hn::Load(df, token_scales + strip * kLanes));
    const VF minimum =
        hn::Mul(hn::Load(df, token_minima + strip * kLanes), hn::Set(df, query_sums[h]));
    hn::StoreU(hn::Add(scaled, minimum), df, out.logits + h * out.stride + strip * kLanes);
  }
};

// store(h, strip, sum_c m[h][c] * n[token][c]) for the tokens of every strip.
template <typename DotT, int kBits, int kPlanes, int kHeads, typename Store>
HWY_INLINE void MultiplyRows(const std::byte* quants, int num_rows, const IntegerWeights& weights,
                             const Store& store) {
  // Eight bits are two fields of four, whose sums are put together in the end.
  constexpr int kFieldBits = std::min(kBits, 4);
  constexpr int kFields = 8 / kFieldBits;
  constexpr int kRowsPerTotal = kQuadsPerTotal / (kFields / 2);
  const VU mask = hn::Set(du, ((1u << kFieldBits) - 1) * 0x01010101u);
  HWY_UNROLL(4)
  for (int strip = 0; strip < kStrips; ++strip) {
    const auto* rows = reinterpret_cast<const uint32_t*>(quants) + strip * kLanes;
    VI totals[kHeads][kPlanes][2];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      HWY_UNROLL(2)
      for (int p = 0; p < kPlanes; ++p) totals[h][p][0] = totals[h][p][1] = hn::Zero(di);
    }
    for (int first = 0; first < num_rows; first += kRowsPerTotal) {
      VI sums[kHeads][kPlanes][2];
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) {
        HWY_UNROLL(2)
        for (int p = 0; p < kPlanes; ++p) sums[h][p][0] = sums[h][p][1] = hn::Zero(di);
      }
      for (int row = first; row < std::min(first + kRowsPerTotal, num_rows); ++row) {
        VU fields = hn::Load(du, rows + row * kBlockTokens);
        HWY_UNROLL(4)
        for (int f = 0; f < kFields; ++f, fields = hn::ShiftRight<kFieldBits>(fields)) {
          const VU quads = hn::And(fields, mask);
          const int channel = row * QuantRowChannels(kBits) + (kBits == 8 ? 0 : 4 * f);
          HWY_UNROLL(4)
          for (int h = 0; h < kHeads; ++h) {
            HWY_UNROLL(2)
            for (int p = 0; p < kPlanes; ++p) {
              sums[h][p][f % 2] =
                  DotT::MulAdd(sums[h][p][f % 2], quads, weights.planes[h][p] + channel);
            }
          }
        }
      }
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) {
        HWY_UNROLL(2)
        for (int p = 0; p < kPlanes; ++p) {
          totals[h][p][0] = hn::Add(totals[h][p][0], DotT::Total(sums[h][p][0]));
          totals[h][p][1] = hn::Add(totals[h][p][1], DotT::Total(sums[h][p][1]));
        }
      }
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      VI dot = hn::Zero(di);
      HWY_UNROLL(2)
      for (int p = 0; p < kPlanes; ++p) {
        const VI upper = kBits == 8 ? hn::ShiftLeft<4>(totals[h][p][1]) : totals[h][p][1];
        dot = hn::Add(hn::ShiftLeft<7>(dot), hn::Add(totals[h][p][0], upper));
      }
      store(h, strip, hn::ConvertTo(df, dot));
    }
  }
}

// The same for few heads at four bits where two strips make a block: weights are loaded once for
// both, and their sums fit the registers side by side.
template <typename DotT, int kHeads, typename Store>
HWY_INLINE void MultiplyNibbles(const std::byte* quants, int num_rows,
                                const IntegerWeights& weights, const Store& store) {
  constexpr int kRowsPerTotal = kQuadsPerTotal / 2;
  const VU mask = hn::Set(du, 0x0f0f0f0fu);
  const auto* rows = reinterpret_cast<const uint32_t*>(quants);
  VI totals[kHeads][2];
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) totals[h][0] = totals[h][1] = hn::Zero(di);
  for (int first = 0; first < num_rows; first += kRowsPerTotal) {
    VI sums[kHeads][2];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = hn::Zero(di);
    for (int row = first; row < std::min(first + kRowsPerTotal, num_rows); ++row) {
      VU fields[2];
      HWY_UNROLL(2)
      for (int s = 0; s < 2; ++s) fields[s] = hn::Load(du, rows + row * kBlockTokens + s * kLanes);
      HWY_UNROLL(2)
      for (int f = 0; f < 2; ++f) {
        const int channel = row * QuantRowChannels(4) + 4 * f;
        HWY_UNROLL(4)
        for (int h = 0; h < kHeads; ++h) {
          HWY_UNROLL(2)
          for (int s = 0; s < 2; ++s) {
            const VU quads = hn::And(f == 0 ? fields[s] : hn::ShiftRight<4>(fields[s]), mask);
            sums[h][s] = DotT::MulAdd(sums[h][s], quads, weights.planes[h][0] + channel);
          }
        }
      }
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      HWY_UNROLL(2)
      for (int s = 0; s < 2; ++s) totals[h][s] = hn::Add(totals[h][s], DotT::Total(sums[h][s]));
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(2)
    for (int s = 0; s < 2; ++s) store(h, s, hn::ConvertTo(df, totals[h][s]));
  }
}

// Calls f(first_head, std::integral_constant<int, heads>) for tiles of up to kTileHeads heads.
template <typename F>
void ForHeadTiles(int num_heads, const F& f) {
  int head = 0;
  for (; head + kTileHeads <= num_heads; head += kTileHeads) {
    f(head, std::integral_constant<int, kTileHeads>());
  }
  switch (num_heads - head) {
    case 3:
      return f(head, std::integral_constant<int, 3>());
    case 2:
      return f(head, std::integral_constant<int, 2>());
    case 1:
      return f(head, std::integral_constant<int, 1>());
    default:
      return;
  }
}

constexpr float CentreOf(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

// ---- Estimators ------------------------------------------------------------------------------

// What a batch of blocks goes through, step by step.
struct BlockBatch {
  alignas(64) float steps[kBatchBlocks][kMaxSidecarHeadDim];
  alignas(64) float mids[kBatchBlocks][kMaxSidecarHeadDim];
  WeightSums sums[kBatchBlocks];
  IntegerWeights weights[kBatchBlocks];
};

// kChannels: of all calls; 0: any number.
template <typename DotT, int kBits, typename T, int kChannels>
void EstimateBlockQuant(const EstimateCall& call, const Mirror& mirror) {
  constexpr int kPlanes = kBits == 8 ? 2 : 1;
  const KeyBlocks& keys = *call.keys;
  const int channels = kChannels == 0 ? call.channels : kChannels;
  const int num_rows = kChannels == 0 ? mirror.num_rows : kChannels / QuantRowChannels(kBits);
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const int64_t range_bytes = 2 * channels * int64_t{sizeof(T)};
  const auto quants_of = [&](int64_t i) {
    return keys.sidecars.At(SidecarKind::kBlockQuant, keys.block_table[i], keys.kv_head);
  };
  // What is fetched of a block, in parts.
  const int64_t half_bytes = int64_t{(num_rows + 1) / 2} * kQuantRowBytes;
  const auto fetch_ranges = [&](int64_t i) {
    if (i >= 0) PrefetchRange(keys.Ranges(i), range_bytes);
  };
  const auto fetch_quants = [&](int64_t i, int half) {
    if (i >= 0) PrefetchRange(quants_of(i) + half * half_bytes, half_bytes);
  };
  const auto prefetch = [&](int64_t i) {
    fetch_ranges(i);
    fetch_quants(i, 0);
    fetch_quants(i, 1);
  };
  BlockBatch batch;
  ForCandidates(
      call, prefetch, [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
        for (int b = 0; b < count; ++b) {
          LoadRanges<T>(keys.Ranges(blocks[b]), channels, kBits, batch.steps[b], batch.mids[b]);
        }
        ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
          const float* queries = call.queries + head * channels;
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_ranges(ahead[b]);
            SumWeights<heads>(queries, channels, batch.steps[b], batch.mids[b], batch.sums[b]);
          }
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_quants(ahead[b], 0);
            RoundWeights<heads, kPlanes>(queries, channels, batch.steps[b], batch.sums[b],
                                         CentreOf(kBits), batch.weights[b]);
          }
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_quants(ahead[b], 1);
            float* logits = call.logits + head * stride + blocks[b] * kBlockTokens;
            const StoreLogits store = {&batch.weights[b], logits, stride};
            if constexpr (kBits == 4 && kStrips == 2 && heads <= 3) {
              MultiplyNibbles<DotT, heads>(quants_of(blocks[b]), num_rows, batch.weights[b], store);
            } else {
              MultiplyRows<DotT, kBits, kPlanes, heads>(quants_of(blocks[b]), num_rows,
                                                        batch.weights[b], store);
            }
          }
        });
      });
}

// Per-token mirrors: the weights are the queries, the same for all blocks.
template <typename DotT, int kBits>
void EstimateTokenQuant(const EstimateCall& call, const Mirror& mirror) {
  constexpr int kPlanes = 2;
  struct Tile {
    IntegerWeights weights;
    float sums[kTileHeads];
    float offsets[kTileHeads];
  };
  const bool symmetric = mirror.kind == SidecarKind::kMaxQuant;
  const KeyBlocks& keys = *call.keys;
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const auto mirror_of = [&](int64_t i) {
    return keys.sidecars.At(mirror.kind, keys.block_table[i], keys.kv_head);
  };
  alignas(64) float ones[kMaxSidecarHeadDim];
  alignas(64) float centres[kMaxSidecarHeadDim];
  std::fill_n(ones, call.channels, 1.0f);
  std::fill_n(centres, call.channels, CentreOf(kBits));
  Tile tiles[kMaxGroupHeads / kTileHeads];
  ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
    Tile& tile = tiles[head / kTileHeads];
    const float* queries = call.queries + head * call.channels;
    WeightSums sums;
    SumWeights<heads>(queries, call.channels, ones, centres, sums);
    RoundWeights<heads, kPlanes>(queries, call.channels, ones, sums, CentreOf(kBits), tile.weights);
    for (int h = 0; h < heads; ++h) {
      tile.sums[h] = 0;
      for (int c = 0; c < call.channels; ++c) tile.sums[h] += queries[h * call.channels + c];
      tile.offsets[h] = symmetric ? tile.sums[h] * static_cast<float>(1 << (kBits - 1)) : 0.0f;
    }
  });
  const auto prefetch = [&](int64_t i) {
    PrefetchRange(mirror_of(i), kTokenQuantOffset + int64_t{mirror.num_rows} * kQuantRowBytes);
  };
  const auto compute = [&](int64_t i) HWY_ATTR {
    const std::byte* data = mirror_of(i);
    const hn::Rebind<hwy::float16_t, DF> d16;
    const auto* halves = reinterpret_cast<const hwy::float16_t*>(data);
    alignas(64) float scales[kBlockTokens], minima[kBlockTokens];
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      hn::Store(hn::PromoteTo(df, hn::Load(d16, halves + t)), df, scales + t);
      hn::Store(hn::PromoteTo(df, hn::Load(d16, halves + kBlockTokens + t)), df, minima + t);
    }
    ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
      const Tile& tile = tiles[head / kTileHeads];
      float* logits = call.logits + head * stride + i * kBlockTokens;
      const StoreTokenLogits store = {
          {&tile.weights, logits, stride}, scales, minima, tile.sums, tile.offsets};
      MultiplyRows<DotT, kBits, kPlanes, heads>(data + kTokenQuantOffset, mirror.num_rows,
                                                tile.weights, store);
    });
  };
  ForCandidates(call, prefetch,
                [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
                  for (int b = 0; b < count; ++b) {
                    if (ahead[b] >= 0) prefetch(ahead[b]);
                    compute(blocks[b]);
                  }
                });
}

// Four tokens of kHeads heads at a time; lanes are channels.
template <int kHeads, typename T>
void ExactLogits(const float* queries, const T* keys, int head_dim, float* logits, int64_t stride) {
  const hn::Rebind<T, DF> dt;
  constexpr int kVectors = kLanes < 4 ? 4 : 1;  // FoldFour wants at least four values
  for (int token = 0; token < kBlockTokens; token += 4) {
    VF sums[kHeads][4][kVectors];
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < 4; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[h][t][v] = hn::Zero(df);
      }
    }
    for (int c = 0; c < head_dim; c += kLanes * kVectors) {
      HWY_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) {
        const int at = c + v * kLanes;
        VF key[4];
        HWY_UNROLL(4)
        for (int t = 0; t < 4; ++t) {
          const T* from = keys + (token + t) * head_dim + at;
          if constexpr (sizeof(T) == sizeof(float)) {
            key[t] = hn::LoadU(df, from);
          } else {
            key[t] = hn::PromoteTo(df, hn::LoadU(dt, from));
          }
        }
        HWY_UNROLL(4)
        for (int h = 0; h < kHeads; ++h) {
          const VF q = hn::LoadU(df, queries + h * head_dim + at);
          HWY_UNROLL(4)
          for (int t = 0; t < 4; ++t) sums[h][t][v] = hn::MulAdd(q, key[t], sums[h][t][v]);
        }
      }
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      FoldFour(AddOp(), sums[h], logits + h * stride + token);
    }
  }
}

template <typename T>
void EstimateExactly(const EstimateCall& call) {
  const KeyBlocks& keys = *call.keys;
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const auto keys_of = [&](int64_t i) {
    return keys.kv.Keys<const T>(keys.block_table[i], keys.kv_head);
  };
  const auto prefetch = [&](int64_t i) {
    PrefetchRange(reinterpret_cast<const std::byte*>(keys_of(i)),
                  keys.kv.layout.head_run_elements() * int64_t{sizeof(T)});
  };
  ForCandidates(
      call, prefetch, [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
        ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
          for (int b = 0; b < count; ++b) {
            if (head == 0 && ahead[b] >= 0) prefetch(ahead[b]);
            ExactLogits<heads, T>(call.queries + head * call.channels, keys_of(blocks[b]),
                                  call.channels,
                                  call.logits + head * stride + blocks[b] * kBlockTokens, stride);
          }
        });
      });
}

// ---- Dispatch --------------------------------------------------------------------------------

template <typename DotT, int kBits, typename T>
void EstimateBlocks(const EstimateCall& call, const Mirror& mirror) {
  // What the default policy and small models use.
  constexpr bool kCommon = kBits == 4 && sizeof(T) == 2;
  if constexpr (kCommon) {
    if (call.channels == 64) return EstimateBlockQuant<DotT, kBits, T, 64>(call, mirror);
  }
  EstimateBlockQuant<DotT, kBits, T, 0>(call, mirror);
}

template <typename DotT, int kBits>
void EstimateBits(const EstimateCall& call, const Mirror& mirror) {
  if (mirror.kind != SidecarKind::kBlockQuant) return EstimateTokenQuant<DotT, kBits>(call, mirror);
  switch (call.keys->kv.layout.dtype) {
    case DType::kBF16:
      return EstimateBlocks<DotT, kBits, hwy::bfloat16_t>(call, mirror);
    case DType::kF16:
      return EstimateBlocks<DotT, kBits, hwy::float16_t>(call, mirror);
    default:  // kF32: the caller has checked
      return EstimateBlocks<DotT, kBits, float>(call, mirror);
  }
}

template <typename DotT>
void EstimateWith(const EstimateCall& call, const Mirror& mirror) {
  switch (mirror.bits) {
    case 2:
      return EstimateBits<DotT, 2>(call, mirror);
    case 4:
      return EstimateBits<DotT, 4>(call, mirror);
    default:  // 8: the caller has checked
      return EstimateBits<DotT, 8>(call, mirror);
  }
}

void EstimateFromMirrorTarget(const EstimateCall& call, const Mirror& mirror) {
#if HWY_TARGET == HWY_AVX3
  if (UseVnni()) return EstimateWith<DotVnni>(call, mirror);
#endif
  EstimateWith<Dot>(call, mirror);
}

void EstimateFromKeysTarget(const EstimateCall& call) {
  switch (call.keys->kv.layout.dtype) {
    case DType::kBF16:
      return EstimateExactly<hwy::bfloat16_t>(call);
    case DType::kF16:
      return EstimateExactly<hwy::float16_t>(call);
    default:  // kF32: the caller has checked
      return EstimateExactly<float>(call);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(EstimateFromMirrorTarget);
HWY_EXPORT(EstimateFromKeysTarget);

void EstimateFromMirror(const EstimateCall& call, const Mirror& mirror) {
  HWY_DYNAMIC_DISPATCH(EstimateFromMirrorTarget)(call, mirror);
}

void EstimateFromKeys(const EstimateCall& call) {
  HWY_DYNAMIC_DISPATCH(EstimateFromKeysTarget)(call);
}

void DisableEstimateVnniForTest(bool disable) { estimate_vnni_disabled.store(disable); }

}  // namespace gloam::cpu
#endif  // HWY_ONCE
