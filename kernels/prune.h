// Prune: the third stage of sparse attention. Keeps, of a query head's candidates, the smallest set
// that holds the wanted share of the estimated attention.
#pragma once

#include <cstdint>

#include "kernels/sparsity_policy.h"
#include "kernels/token_set.h"

namespace gloam {

// One query head of one decode row.
struct PruneParams {
  PrunerConfig pruner;
  const float* logits = nullptr;  // [16 * num_blocks] estimated, read where `candidates` has a bit
  const TokenMask* candidates = nullptr;  // [num_blocks]
  // Subset of the candidates that is kept in any case (sinks, recent tokens); counts to the mass
  // and to min_tokens. Null: none.
  const TokenMask* always_kept = nullptr;  // [num_blocks]
  int64_t num_blocks = 0;
  // Exact logits of the open block's tokens, which are kept aside: they count to the mass.
  const float* open_logits = nullptr;  // [num_open]
  int num_open = 0;
  float* weights = nullptr;   // [16 * num_blocks] out: exp(logit - max) of candidates, 0 elsewhere
  TokenMask* kept = nullptr;  // [num_blocks] out: subset of the candidates
};

struct PruneResult {
  float max_logit = 0;    // over candidates and open tokens; weights are relative to it
  double total_mass = 0;  // sum of the weights of candidates and open tokens
  double kept_mass = 0;   // of it, what is kept, open tokens included
  int64_t num_kept = 0;   // of the candidates
};

namespace cpu {

// kTopP: beside what is always kept, {weight >= t} for the largest t at which kept_mass >=
// threshold * total_mass: so equal weights are kept or dropped together, and without the smallest
// of them the mass falls short. Nothing is added where the mass is there already. Beside that,
// what weighs keep_weight * total_mass or more is kept. threshold >= 1 keeps every candidate.
// kThreshold: logit >= max - threshold. min_tokens adds the largest weights that are missing,
// lowest index first among equals.
//
// Sums are taken in double, in an order that the input alone decides: "reached" and "short" hold up
// to a relative error of num_tokens * 2^-52. NaN logits count as -FLT_MAX, infinite ones as the
// largest finite numbers; without any token max_logit is -FLT_MAX. Precondition: threshold > 0.
// Any thread; no memory is taken once a thread has seen the longest context.
PruneResult Prune(const PruneParams& params);

}  // namespace cpu
}  // namespace gloam
