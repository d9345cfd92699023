// Teacher forcing: how far the next-token distribution under a policy is from the dense one, over a
// given text. One thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "eval/forced_decoder.h"
#include "eval/result_file.h"

namespace gloam {

// Of one row, over the tokens fed.
struct ForcedScores {
  int64_t num_tokens = 0;
  double nll = 0;        // mean negative log-likelihood of the text's next tokens, nats
  double kl = 0;         // mean of KL(dense || row) of the next-token distributions, nats
  double max_kl = 0;     // the largest of them
  double agreement = 0;  // share of the steps in which the likeliest token is dense's
  std::optional<SparsityUsage> sparsity;  // of rows with a policy
  LayerShares layers;                     // the same
};

// Prefills `context` once, then feeds `tokens` but the last to every row; row i has policies[i].
// The first policy must be null: dense, the reference. Errors: those of ForcedDecoder::Start, and
// kInvalidArgument for fewer than two tokens.
[[nodiscard]] StatusOr<std::vector<ForcedScores>> RunTeacherForcing(
    ForcedDecoder& decoder, std::span<const int32_t> context, std::span<const int32_t> tokens,
    RowPolicies policies);

}  // namespace gloam
