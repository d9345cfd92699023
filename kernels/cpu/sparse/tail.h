// The tail of sparse attention: what is not kept gives its estimated mass to the mean value of its
// block (TailType::kBlockMean).
#pragma once

#include "kernels/cpu/attention/tile.h"
#include "kernels/selector.h"

namespace gloam::cpu {

struct TailParams {
  KeyBlocks keys;
  int tail_block = kBlockTokens;  // tokens whose mean value is one
  int num_heads = 0;
  int head_dim = 0;
  const float* weights = nullptr;   // [num_heads][16 * num_blocks]; 0 where no candidate
  const TokenMask* kept = nullptr;  // [num_heads][num_blocks]
  float* masses = nullptr;          // [num_heads][num_blocks]
  int32_t* listed = nullptr;        // [num_blocks]
};

// Writes what each head leaves of a block's mass to `masses`, relative to the logit that the
// weights are relative to, its sum to sums[head], and the blocks in which some head leaves any to
// `listed`, ascending; returns their number. Any thread.
int64_t FindTail(const TailParams& params, float* sums);

// Adds the mean values of the listed blocks, times their masses, to acc, [num_heads][head_dim]. Any
// thread.
void AddTailMeans(const TailParams& params, int64_t num_listed, float* acc);

}  // namespace gloam::cpu
