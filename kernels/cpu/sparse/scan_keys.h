// What token_scan.cc has of keys and masks without vectors: floats as integers in the same order,
// where to split them, and the tokens of a mask.
#pragma once

#include <bit>
#include <cstdint>

namespace gloam::cpu {

// The order of floats as integers: negative ones have their magnitude inverted. Its own inverse.
inline int32_t OrderBits(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// A key in (min, max] that splits the keys between them: the middle of the values, or of their
// bits. The first suits logits, the second weights, which span many powers of two; the second also
// bounds the number of splits whatever the values are.
inline int32_t PivotOf(int32_t min, int32_t max, bool by_value) {
  if (by_value) {
    const float low = std::bit_cast<float>(OrderBits(min));
    const float high = std::bit_cast<float>(OrderBits(max));
    const float middle = 0.5f * low + 0.5f * high;
    if (middle > low && middle < high) return OrderBits(std::bit_cast<int32_t>(middle));
  }
  const int64_t distance = int64_t{max} - min;
  return static_cast<int32_t>(min + (distance + 1) / 2);
}

// Row m: the positions of the bits set in m, in ascending order, then zeros.
struct SetBits {
  int32_t rows[256][8] = {};
  constexpr SetBits() {
    for (int m = 0; m < 256; ++m) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if ((m >> bit & 1) != 0) rows[m][count++] = bit;
      }
    }
  }
};
alignas(64) inline constexpr SetBits kSetBits;

}  // namespace gloam::cpu
