// Scores of blocks from the ranges of their keys in each channel. With the whole range counted they
// are Quest's bounds: no key of a block has a larger logit than the block's score.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/selector.h"

namespace gloam::cpu {

// scores[head][block] = sum over channels of q * middle + range_weight * |q| * (half the range),
// which is max(q * minimum, q * maximum) at range_weight 1, for every block in which some head has
// a candidate (masks, [num_heads][num_blocks]); the others stay as they are. Rows of `scores` are
// 16 * num_blocks apart. A score is a function of the block and the head's query alone. Summed in
// fp32: a bound may fall short of the exact sum, and so of a logit, by up to head_dim * 2^-24 * sum
// of |q| * max(|minimum|, |maximum|).
// Needs the ranges. Reads 2 * head_dim elements a block; 4 * num_heads * head_dim FLOPs. Any
// thread.
struct BlockScores {
  KeyBlocks keys;
  const float* queries = nullptr;  // [num_heads, head_dim]
  int num_heads = 0;
  int head_dim = 0;
  float range_weight = 1;  // 0 to 1
  const TokenMask* masks = nullptr;
  float* scores = nullptr;
  // Only blocks [begin_block, end_block) of them.
  int64_t begin_block = 0;
  int64_t end_block = std::numeric_limits<int64_t>::max();
};
void ScoreBlocks(const BlockScores& work);

}  // namespace gloam::cpu
