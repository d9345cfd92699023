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

// weights = exp(logit - max), 0 for the other tokens of the same blocks; blocks without a token are
// not written. Returns their sum. Logits as for MaxOf, max >= all of them.
double ExpWeights(const float* logits, const TokenMask* masks, int64_t num_blocks, float max,
                  float* weights);

// Sum in double: relative error at most num_tokens * 2^-53 for values of one sign.
double SumOf(const float* values, const TokenMask* masks, int64_t num_blocks);

// Clears the bits of tokens whose value is below `at_least`; NaN is.
void KeepAtLeast(const float* values, float at_least, int64_t num_blocks, TokenMask* masks);

// ---- cuts: the search for the value that a sum or a count is reached at

// Integers in the order of the values: NaN first, and zeros of both signs equal.
struct KeyBuffers {
  std::vector<int32_t> keys;
  std::vector<int32_t> spare;
};
// The calling thread's, with room for num_tokens keys.
KeyBuffers& ThreadKeyBuffers(int64_t num_tokens);

// Writes the keys of the tokens into buffers.keys and returns how many.
int64_t GatherKeys(const float* values, const TokenMask* masks, int64_t num_blocks,
                   KeyBuffers& buffers);
// The same without values below `at_least`, which is not NaN.
int64_t GatherKeysFrom(const float* values, float at_least, const TokenMask* masks,
                       int64_t num_blocks, KeyBuffers& buffers);

struct Cut {
  int32_t key = 0;
  double above = 0;  // the count, or the sum, of keys > key
};
// The largest of the gathered keys for which `count` keys are >= it. 0 < count <= num_keys.
// Clobbers the buffers. Reads keys while undecided, in at most 64 passes and two to four in
// practice.
Cut CutByCount(KeyBuffers& buffers, int64_t num_keys, int64_t count);
// The largest of the gathered keys for which the values >= it sum to `mass`; the smallest where all
// of them do not reach it. Values are not negative; 0 < num_keys.
Cut CutByMass(KeyBuffers& buffers, int64_t num_keys, double mass);

// Keeps of `masks` the tokens with keys > cut and the first num_equal of those with keys == cut.
void KeepFromCut(const float* values, int32_t cut, int64_t num_equal, int64_t num_blocks,
                 TokenMask* masks);
// The value whose key is `key`.
float ValueOfKey(int32_t key);

}  // namespace gloam::cpu
