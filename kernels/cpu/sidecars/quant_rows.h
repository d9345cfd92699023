// The CPU backend's order of the quants in sidecars, made for dot products of four bytes a lane
// with a lane per token. Quants of b bits come in rows of 64 bytes; a row has 8 / b quads of
// channels for 16 tokens:
//
//   byte 4 * token + i, bits [b * f, b * f + b): channel 4 * (row * 8 / b + f) + i
//
// so that a shift and a mask of the row yield one quad, [16 tokens][4 channels], as bytes. Channels
// past the last fill up the last row of labels; what they hold is of no meaning.
#pragma once

#include "kernels/paged_kv.h"
#include "kernels/sidecars.h"

namespace gloam::cpu {

inline constexpr int kQuantRowBytes = 64;
static_assert(kQuantRowBytes == kBlockTokens * 4);

inline constexpr int kQuantVectorChannels = 16;  // loops over channels take this many at a time

constexpr int QuantRowChannels(int bits) { return 32 / bits; }
constexpr int NumQuantRows(int channels, int bits) {
  return (channels + QuantRowChannels(bits) - 1) / QuantRowChannels(bits);
}
constexpr int RoundUpChannels(int channels) {
  return (channels + kQuantVectorChannels - 1) / kQuantVectorChannels * kQuantVectorChannels;
}

// Quants per token: fp16 scale[16] and minimum[16] (unused when symmetric), then the rows. The
// symmetric ones are stored plus 2^(bits - 1).
inline constexpr int kTokenMinimumOffset = 32;
inline constexpr int kTokenQuantOffset = 64;

}  // namespace gloam::cpu
