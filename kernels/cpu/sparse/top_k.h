// The best of a row of scores, without sorting it. Deterministic; of equal scores the lowest index
// first; NaN is below everything. Any thread.
#pragma once

#include <cstdint>

#include "kernels/token_set.h"

namespace gloam::cpu {

// Keeps of `masks`, [num_blocks], the `count` tokens with the largest scores, [16 * num_blocks];
// all of them when there are no more.
void KeepTopTokens(const float* scores, int64_t count, int64_t num_blocks, TokenMask* masks);

// Of the blocks with a token keeps the `count` that have the largest scores and clears the masks of
// the others. `scores` has one entry per block and is readable up to a multiple of 16.
void KeepTopBlocks(const float* scores, int64_t count, int64_t num_blocks, TokenMask* masks);

}  // namespace gloam::cpu
