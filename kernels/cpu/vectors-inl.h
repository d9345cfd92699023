// Vectors of sixteen neighbours - rows of a weight's panel, tokens of a block, channels - and the
// products of bytes that they take, once per instruction set.
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

#if defined(GLOAM_VECTORS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_VECTORS_INL_H
#undef GLOAM_VECTORS_INL_H
#else
#define GLOAM_VECTORS_INL_H
#endif

// Loops whose arrays are meant to be registers. Without vectors there are none to be had: unrolled,
// the matrix kernels compile 35 s longer (GCC 12).
#undef GLOAM_UNROLL
#if HWY_TARGET == HWY_SCALAR
#define GLOAM_UNROLL
#elif defined(__clang__)
#define GLOAM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GLOAM_UNROLL _Pragma("GCC unroll 16")
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Sixteen neighbours are kStrips vectors of kLanes.
constexpr int kNeighbours = 16;
using DF = hn::CappedTag<float, kNeighbours>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using VU = hn::Vec<DU>;
constexpr DF df;
constexpr DI di;
constexpr DU du;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(df));
constexpr int kStrips = kNeighbours / kLanes;

#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128

// MulPairs: unsigned bytes times signed ones, two neighbouring products added in an int16, which
// saturates (but in SSE2). AddPairs: of int16 products, two neighbours added in an int32.
#if HWY_TARGET == HWY_AVX3
inline __m512i MulPairs(__m512i u, __m512i s) { return _mm512_maddubs_epi16(u, s); }
inline __m512i AddPairs(__m512i p, __m512i f) { return _mm512_madd_epi16(p, f); }
#elif HWY_TARGET == HWY_AVX2
inline __m256i MulPairs(__m256i u, __m256i s) { return _mm256_maddubs_epi16(u, s); }
inline __m256i AddPairs(__m256i p, __m256i f) { return _mm256_madd_epi16(p, f); }
#elif HWY_TARGET == HWY_SSE2
inline __m128i MulPairs(__m128i u, __m128i s) {
  const __m128i low = _mm_set1_epi16(0xff);
  const __m128i even =
      _mm_mullo_epi16(_mm_and_si128(u, low), _mm_srai_epi16(_mm_slli_epi16(s, 8), 8));
  const __m128i odd = _mm_mullo_epi16(_mm_srli_epi16(u, 8), _mm_srai_epi16(s, 8));
  return _mm_add_epi16(even, odd);
}
inline __m128i AddPairs(__m128i p, __m128i f) { return _mm_madd_epi16(p, f); }
#else
inline __m128i MulPairs(__m128i u, __m128i s) { return _mm_maddubs_epi16(u, s); }
inline __m128i AddPairs(__m128i p, __m128i f) { return _mm_madd_epi16(p, f); }
#endif

// Four bytes in every lane.
inline VI BroadcastFour(const int8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, sizeof(four));
  return hn::Set(di, four);
}

// Keeps a sum where it is: GCC would add many products as a tree, for which there are not the
// registers.
template <typename V>
HWY_INLINE V InOrder(V sum) {
#if HWY_TARGET == HWY_AVX3
  asm("" : "+v"(sum.raw));
#else
  asm("" : "+x"(sum.raw));
#endif
  return sum;
}

#endif  // x86

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
