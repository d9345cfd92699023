// The loops that make sidecars, in the best instruction set of the host (Highway's run-time
// dispatch): ranges, means and quants of a block's 16 rows. On the calling thread; the same result
// on every instruction set. `channels` are multiples of 16, rows follow each other closely.
#pragma once

#include <cstdint>

#include "kernels/tensor_view.h"

namespace gloam::cpu {

// out[i] = in[i] as fp32, exactly; `count` elements of `dtype` (kBF16, kF16 or kF32).
void ConvertToF32(const void* in, DType dtype, int64_t count, float* out);

// Per channel over the 16 tokens of x [16][channels].
void ChannelRanges(const float* x, int channels, float* min, float* max);
void ChannelMeans(const float* x, int channels, float* mean);
// Per token over the channels: min and max are [16].
void TokenRanges(const float* x, int channels, float* min, float* max);

// quants[token][c] = round((x[token][c] - min[c]) / (max[c] - min[c]) * levels); 0 where the range
// is empty.
void QuantizePerChannel(const float* x, int channels, const float* min, const float* max,
                        int levels, uint8_t* quants);

// How one token's channels are quantised: clamp(round((x - base) / step), low, high) + offset.
struct TokenQuantizer {
  float base[16];
  float step[16];  // > 0
  int low = 0;
  int high = 0;
  int offset = 0;
};
void QuantizePerToken(const float* x, int channels, const TokenQuantizer& quantizer,
                      uint8_t* quants);

}  // namespace gloam::cpu
