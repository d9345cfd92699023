// Weights of a few query heads as integers, as weights-inl.h makes and products-inl.h takes them.
#pragma once

#include <cstdint>

#include "kernels/sidecars.h"

namespace gloam::cpu {

// Query heads that are computed together: their sums fit the registers.
inline constexpr int kTileHeads = 4;

// Of up to kTileHeads heads.
struct IntegerWeights {
  alignas(64) int8_t planes[kTileHeads][2][kMaxSidecarHeadDim];  // m, or m / 128 and the rest
  alignas(16) float scales[kTileHeads];
  alignas(16) float constants[kTileHeads];
};

}  // namespace gloam::cpu
