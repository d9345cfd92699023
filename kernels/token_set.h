// TokenMask: which of a block's 16 tokens are meant, one bit each (bit i: token i). A set of
// context tokens is an array of masks, one per block: unions, intersections and counts are integer
// operations, and ascending order comes by itself.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/paged_kv.h"

namespace gloam {

using TokenMask = uint16_t;
static_assert(kBlockTokens == 16);

inline constexpr TokenMask kNoTokens = 0;
inline constexpr TokenMask kAllTokens = 0xffff;

inline int CountTokens(TokenMask mask) { return std::popcount(mask); }

// Four masks at a time: a baseline x86-64 has no instruction that counts bits.
inline int64_t CountTokens(const TokenMask* masks, int64_t num_blocks) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 4 <= num_blocks; i += 4) {
    uint64_t bits;
    std::memcpy(&bits, masks + i, sizeof(bits));
    bits -= bits >> 1 & 0x5555555555555555;
    bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
    bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
    count += static_cast<int64_t>(bits * 0x0101010101010101 >> 56);
  }
  for (; i < num_blocks; ++i) count += std::popcount(masks[i]);
  return count;
}

}  // namespace gloam
