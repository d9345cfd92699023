// TokenMask: which of a block's 16 tokens are meant, one bit each (bit i: token i). A set of
// context tokens is an array of masks, one per block: unions, intersections and counts are integer
// operations, and ascending order comes by itself.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/paged_kv.h"

namespace gloam {

using TokenMask = uint16_t;
static_assert(kBlockTokens == 16);

inline constexpr TokenMask kNoTokens = 0;
inline constexpr TokenMask kAllTokens = 0xffff;

inline int CountTokens(TokenMask mask) { return std::popcount(mask); }

inline int64_t CountTokens(const TokenMask* masks, int64_t num_blocks) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_blocks; ++i) count += std::popcount(masks[i]);
  return count;
}

}  // namespace gloam
