// Estimate: the second stage of sparse attention. Logits of the candidates from a small mirror of
// the keys instead of the keys themselves.
#pragma once

#include "kernels/selector.h"

namespace gloam {

// logits[head][token] = queries[head] . k~[token] for every token of every block in which some
// head has a candidate; the other entries stay as they are. `queries` carry the softmax scale.
struct EstimateParams {
  EstimatorConfig estimator;
  KeyBlocks keys;
  const float* queries = nullptr;  // [num_heads, head_dim]
  int num_heads = 0;
  int head_dim = 0;
  const TokenMask* masks = nullptr;  // [num_heads][num_blocks] candidates
  float* logits = nullptr;           // [num_heads][16 * num_blocks]
};

namespace cpu {

// CPU backend; one decode row and KV head; any thread. kNone computes exact logits from the keys.
void Estimate(const EstimateParams& params);

}  // namespace cpu
}  // namespace gloam
