// Estimate: the second stage of sparse attention. Logits of the candidates from a small mirror of
// the keys instead of the keys themselves.
#pragma once

#include <limits>

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
  // Only blocks [begin_block, end_block) of them.
  int64_t begin_block = 0;
  int64_t end_block = std::numeric_limits<int64_t>::max();
};

// The same from the calibrated channels alone: logits[head][token] = sum over the KV head's label
// channels of queries[head][channel] * k~[token][channel]. Needs kLabels.
struct EstimateFromLabelsParams {
  KeyBlocks keys;
  int layer = 0;                   // for the calibrated channels
  const float* queries = nullptr;  // [num_heads, head_dim]
  int num_heads = 0;
  int head_dim = 0;
  const TokenMask* masks = nullptr;  // [num_heads][num_blocks] candidates
  float* logits = nullptr;           // [num_heads][16 * num_blocks]
};

namespace cpu {

// CPU backend; one decode row and KV head; any thread; at most kMaxGroupHeads heads. A block's
// logits are a function of the block and a head's query alone, the same on every instruction set
// but for kNone, which computes exact logits from the keys in fp32. With quants, k~ as in
// sidecars.h, the query's weights are rounded to integers on the way: with w the products of query
// and step (of query alone, for quants per token) a logit is off by at most
//   block quants of 2 and 4 bits   d * (2^b - 1) / 2 * max |w| / 254
//   others                         d * (2^b - 1) / 2 * max |w| / 32512 (times the token's scale)
// and the rounding of fp32. In the root mean square that is 0.14 of what the 4-bit quants
// themselves cost (tests/kernels/estimate_test, keys with an outlier channel).
void Estimate(const EstimateParams& params);
void EstimateFromLabels(const EstimateFromLabelsParams& params);

inline constexpr int kMaxGroupHeads = 32;

}  // namespace cpu
}  // namespace gloam
