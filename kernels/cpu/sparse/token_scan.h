// Vectorised passes over a row of values, one per token of a list of blocks, [16 * num_blocks];
// only those count whose bit is set in `masks`, [num_blocks], and blocks without one are not read.
// Shared by top-k selection and pruning. Any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/token_set.h"

namespace gloam::cpu {

// NaN counts as -FLT_MAX here and infinities as the largest finite numbers, so that differences are
// numbers. -FLT_MAX where no token counts.
float MaxOf(const float* values, const TokenMask* masks, int64_t num_blocks);

// weights = exp(logit - max), 0 for tokens that do not count. Returns their sum. Logits as for
// MaxOf, max >= all of them.
double ExpWeights(const float* logits, const TokenMask* masks, int64_t num_blocks, float max,
                  float* weights);

// Sum in double: relative error at most num_tokens * 2^-53 for values of one sign.
double SumOf(const float* values, const TokenMask* masks, int64_t num_blocks);

// Clears the bits of tokens whose value is below `at_least`; NaN is.
void KeepAtLeast(const float* values, float at_least, int64_t num_blocks, TokenMask* masks);

// kept := the tokens that weigh `at_least`, which is above 0, or more. Returns the sum of their
// weights. Weights are 0 or more, and 0 for tokens that do not count.
double KeepWeights(const float* weights, float at_least, const TokenMask* masks, int64_t num_blocks,
                   TokenMask* kept);

// Lists the tokens, ascending; `tokens` has room for eight more. Returns their number.
int64_t ListTokens(const TokenMask* masks, int64_t num_blocks, int32_t* tokens);

// Sum of CountTokens.
int64_t CountOf(const TokenMask* masks, int64_t num_blocks);

// Blocks as the tokens of groups of sixteen, for searches among blocks: whether block i has a token
// is bit i % 16 of groups[i / 16].
void GroupBlocks(const TokenMask* masks, int64_t num_blocks, TokenMask* groups);
// Clears the masks of the blocks whose bit is not set.
void KeepGroupedBlocks(const TokenMask* groups, int64_t num_blocks, TokenMask* masks);

// ---- cuts: the search for the value that a sum or a count is reached at

// Integers in the order of the values: NaN first, and zeros of both signs equal.
struct KeyBuffers {
  std::vector<int32_t> keys;
  std::vector<int32_t> spare;
};
// The calling thread's, with room for num_tokens keys.
KeyBuffers& ThreadKeyBuffers(int64_t num_tokens);

struct KeyRange {
  int64_t count = 0;
  int32_t min = 0;  // bounds of the keys
  int32_t max = 0;
};
// Writes the keys of the tokens into buffers.keys.
KeyRange GatherKeys(const float* values, const TokenMask* masks, int64_t num_blocks,
                    KeyBuffers& buffers);
// The same for weights, which are from 0 to 1, without those below `at_least`, which is above 0.
KeyRange GatherWeights(const float* weights, float at_least, const TokenMask* masks,
                       int64_t num_blocks, KeyBuffers& buffers);

struct Cut {
  int32_t key = 0;
  double above = 0;  // the count, or the sum, of keys > key
};
// The largest of the gathered keys for which `count` keys are >= it. 0 < count <= keys.count.
// Clobbers the buffers. Passes over what is undecided, at most 96 times: each leaves three quarters
// of it or less, or the next one halves the range of the keys.
Cut CutByCount(KeyBuffers& buffers, const KeyRange& keys, int64_t count);
// The largest of the gathered keys for which the values >= it sum to `mass`; the smallest where all
// of them do not reach it. Values are not negative; 0 < keys.count.
Cut CutByMass(KeyBuffers& buffers, const KeyRange& keys, double mass);

// Keeps of `masks` the tokens with keys > cut and the first num_equal of those with keys == cut.
void KeepFromCut(const float* values, int32_t cut, int64_t num_equal, int64_t num_blocks,
                 TokenMask* masks);
// The value whose key is `key`.
float ValueOfKey(int32_t key);

}  // namespace gloam::cpu
