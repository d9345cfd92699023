// Dot products of four unsigned weights and four signed activations per lane, exact in int32, once
// per instruction set.
//
// Products of kQuads quads gather in a Part, which then becomes part of the int32 sum. kSigned: the
// weights count as what they are less 128.
#include <cstdint>
#include <cstring>

#include "kernels/cpu/vectors-inl.h"

#if defined(GLOAM_GEMM_DOT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_GEMM_DOT_INL_H
#undef GLOAM_GEMM_DOT_INL_H
#else
#define GLOAM_GEMM_DOT_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || !HWY_ARCH_X86

// Portable: the products of bytes fit int16, their sums are taken in int32.
template <int kBits>
struct Dot {
  static constexpr int kQuads = 1;
  static constexpr bool kSigned = false;
  using Weights = VI;
  using Part = VI;
  static Weights Prepare(VU quads) { return hn::BitCast(di, quads); }
  static Part Mul(Weights w, const int8_t* activations) {
    VI sum = hn::Zero(di);
    GLOAM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VI byte = hn::And(w, hn::Set(di, 0xff));
      sum = hn::Add(sum, hn::Mul(byte, hn::Set(di, activations[i])));
      w = hn::ShiftRight<8>(w);
    }
    return sum;
  }
  static Part Add(Part a, Part b) { return hn::Add(a, b); }
  static VI Total(VI sum, Part part) { return hn::Add(sum, part); }
};

#else

using DS = hn::Repartition<int16_t, DF>;
using VS = hn::Vec<DS>;
constexpr DS ds;

inline VI AddBothHalves(VI sum, VS pairs) {
  return InOrder(hn::Add(sum, VI{AddPairs(pairs.raw, hn::Set(ds, 1).raw)}));
}

// maddubs adds two products in int16: at most 2 * 127 * (2^kBits - 1), of which so many fit.
template <int kBits>
struct Dot {
  static constexpr int kQuads = 1 << (7 - kBits);
  static constexpr bool kSigned = false;
  using Weights = VU;
  using Part = VS;
  static Weights Prepare(VU quads) { return quads; }
  static Part Mul(Weights w, const int8_t* activations) {
    return Part{MulPairs(w.raw, BroadcastFour(activations).raw)};
  }
  static Part Add(Part a, Part b) { return InOrder(hn::Add(a, b)); }
  static VI Total(VI sum, Part part) { return AddBothHalves(sum, part); }
};

// Eight bits: 2 * 127 * 255 do not fit, but 2 * 127 * 128 do, so the weights are made signed and
// their signs go to the activations.
template <>
struct Dot<8> {
  static constexpr int kQuads = 1;
  static constexpr bool kSigned = true;
  struct Weights {
    VU sign;
    VU size;
  };
  using Part = VS;
  static Weights Prepare(VU quads) {
    const hn::Repartition<int8_t, DF> d8;
    const VU sign = hn::Xor(quads, hn::Set(du, 0x80808080));
    return {sign, hn::BitCast(du, hn::Abs(hn::BitCast(d8, sign)))};
  }
  static Part Mul(const Weights& w, const int8_t* activations) {
    return Part{MulPairs(w.size.raw, WithSign(BroadcastFour(activations), w.sign).raw)};
  }
  static Part Add(Part a, Part b) { return InOrder(hn::Add(a, b)); }
  static VI Total(VI sum, Part part) { return AddBothHalves(sum, part); }

 private:
  static VI WithSign(VI a, VU sign) {
#if HWY_TARGET == HWY_AVX3
    const __mmask64 negative = _mm512_movepi8_mask(sign.raw);
    return VI{_mm512_mask_sub_epi8(a.raw, negative, _mm512_setzero_si512(), a.raw)};
#elif HWY_TARGET == HWY_AVX2
    return VI{_mm256_sign_epi8(a.raw, sign.raw)};
#else
    return VI{_mm_sign_epi8(a.raw, sign.raw)};
#endif
  }
};

#endif

#if HWY_TARGET == HWY_AVX3
// As an asm statement because Highway 1.0.3 has no target with AVX512-VNNI but without AVX-VNNI,
// which the compiler could then use on hosts that lack it.
struct DotVnni {
  static constexpr int kQuads = 0;  // no parts: the sum takes the products
  static constexpr bool kSigned = false;
  using Weights = VU;
  static Weights Prepare(VU quads) { return quads; }
  static VI MulAdd(VI sum, Weights w, const int8_t* activations) {
    const auto* four = reinterpret_cast<const int32_t*>(activations);
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(w.raw), "m"(*four));
    return sum;
  }
};

#endif

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
