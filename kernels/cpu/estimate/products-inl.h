// Products of a block's quants with integer weights, once per instruction set.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/estimate/weights-inl.h"
#include "kernels/cpu/sidecars/quant_rows.h"
#include "kernels/cpu/vnni.h"

#if defined(GLOAM_ESTIMATE_PRODUCTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ESTIMATE_PRODUCTS_INL_H
#undef GLOAM_ESTIMATE_PRODUCTS_INL_H
#else
#define GLOAM_ESTIMATE_PRODUCTS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// ---- Dot products of four quants (at most 15) and four signed weights per lane, exact ---------
//
// sum = MulAdd(sum, ...) up to kQuadsPerTotal times from zero, then Total(sum) as int32.

// As many pairs of products, each at most 2 * 15 * 127, fit an int16.
constexpr int kQuadsPerTotal = 8;

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || !HWY_ARCH_X86

struct Dot {
  static VI MulAdd(VI sum, VU quads, const int8_t* weights) {
    GLOAM_UNROLL
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
#endif

template <typename DotT, typename F>
void WithBits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f(DotT(), std::integral_constant<int, 2>());
    case 4:
      return f(DotT(), std::integral_constant<int, 4>());
    default:  // 8: the caller has checked
      return f(DotT(), std::integral_constant<int, 8>());
  }
}

// Calls f(dot, std::integral_constant<int, bits>) with the host's best Dot.
template <typename F>
void WithDotAndBits(int bits, const F& f) {
#if HWY_TARGET == HWY_AVX3
  if (UseVnni()) return WithBits<DotVnni>(bits, f);
#endif
  WithBits<Dot>(bits, f);
}

// ---- Products --------------------------------------------------------------------------------

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

// store(h, strip, sum_c m[h][c] * n[token][c]) for the tokens of every strip.
template <typename DotT, int kBits, int kPlanes, int kHeads, typename Store>
HWY_INLINE void MultiplyRows(const std::byte* quants, int num_rows, const IntegerWeights& weights,
                             const Store& store) {
  // Eight bits are two fields of four, whose sums are put together in the end.
  constexpr int kFieldBits = std::min(kBits, 4);
  constexpr int kFields = 8 / kFieldBits;
  constexpr int kRowsPerTotal = kQuadsPerTotal / (kFields / 2);
  const VU mask = hn::Set(du, ((1u << kFieldBits) - 1) * 0x01010101u);
  GLOAM_UNROLL
  for (int strip = 0; strip < kStrips; ++strip) {
    const auto* rows = reinterpret_cast<const uint32_t*>(quants) + strip * kLanes;
    VI totals[kHeads][kPlanes][2];
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      GLOAM_UNROLL
      for (int p = 0; p < kPlanes; ++p) totals[h][p][0] = totals[h][p][1] = hn::Zero(di);
    }
    for (int first = 0; first < num_rows; first += kRowsPerTotal) {
      VI sums[kHeads][kPlanes][2];
      GLOAM_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        GLOAM_UNROLL
        for (int p = 0; p < kPlanes; ++p) sums[h][p][0] = sums[h][p][1] = hn::Zero(di);
      }
      for (int row = first; row < std::min(first + kRowsPerTotal, num_rows); ++row) {
        VU fields = hn::Load(du, rows + row * kBlockTokens);
        GLOAM_UNROLL
        for (int f = 0; f < kFields; ++f, fields = hn::ShiftRight<kFieldBits>(fields)) {
          const VU quads = hn::And(fields, mask);
          const int channel = row * QuantRowChannels(kBits) + (kBits == 8 ? 0 : 4 * f);
          GLOAM_UNROLL
          for (int h = 0; h < kHeads; ++h) {
            GLOAM_UNROLL
            for (int p = 0; p < kPlanes; ++p) {
              sums[h][p][f % 2] =
                  DotT::MulAdd(sums[h][p][f % 2], quads, weights.planes[h][p] + channel);
            }
          }
        }
      }
      GLOAM_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        GLOAM_UNROLL
        for (int p = 0; p < kPlanes; ++p) {
          totals[h][p][0] = hn::Add(totals[h][p][0], DotT::Total(sums[h][p][0]));
          totals[h][p][1] = hn::Add(totals[h][p][1], DotT::Total(sums[h][p][1]));
        }
      }
    }
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      VI dot = hn::Zero(di);
      GLOAM_UNROLL
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
  GLOAM_UNROLL
  for (int h = 0; h < kHeads; ++h) totals[h][0] = totals[h][1] = hn::Zero(di);
  for (int first = 0; first < num_rows; first += kRowsPerTotal) {
    VI sums[kHeads][2];
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = hn::Zero(di);
    for (int row = first; row < std::min(first + kRowsPerTotal, num_rows); ++row) {
      VU fields[2];
      GLOAM_UNROLL
      for (int s = 0; s < 2; ++s) fields[s] = hn::Load(du, rows + row * kBlockTokens + s * kLanes);
      GLOAM_UNROLL
      for (int f = 0; f < 2; ++f) {
        const int channel = row * QuantRowChannels(4) + 4 * f;
        GLOAM_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          GLOAM_UNROLL
          for (int s = 0; s < 2; ++s) {
            const VU quads = hn::And(f == 0 ? fields[s] : hn::ShiftRight<4>(fields[s]), mask);
            sums[h][s] = DotT::MulAdd(sums[h][s], quads, weights.planes[h][0] + channel);
          }
        }
      }
    }
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      GLOAM_UNROLL
      for (int s = 0; s < 2; ++s) totals[h][s] = hn::Add(totals[h][s], DotT::Total(sums[h][s]));
    }
  }
  GLOAM_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    GLOAM_UNROLL
    for (int s = 0; s < 2; ++s) store(h, s, hn::ConvertTo(df, totals[h][s]));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
