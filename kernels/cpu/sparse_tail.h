// The tail of sparse attention: what is not kept gives its estimated mass to the mean value of its
// block (TailType::kBlockMean).
#pragma once

#include "kernels/cpu/attention_tile.h"
#include "kernels/selector.h"

namespace gloam::cpu {

struct TailParams {
  KeyBlocks keys;
  int tail_block = kBlockTokens;  // tokens whose mean value is one
  int num_heads = 0;
  int head_dim = 0;
  const float* weights = nullptr;         // [num_heads][16 * num_blocks]; 0 where no candidate
  const TokenMask* candidates = nullptr;  // [num_heads][num_blocks]
  const TokenMask* kept = nullptr;        // [num_heads][num_blocks]
  // Scratch.
  float* masses = nullptr;    // [num_heads][num_blocks]
  int32_t* listed = nullptr;  // [num_blocks]
};

// Adds to partial.acc and partial.sum, blocks in ascending order. The weights are relative to
// the logit that partial.max is to be set to. Any thread.
void AddTailMeans(const TailParams& params, const AttentionPartial& partial);

}  // namespace gloam::cpu
