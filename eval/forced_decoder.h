// ForcedDecoder: several rows that read the same context and are fed the same next tokens, each
// under a policy of its own, side by side in one batch. One thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/sparsity.h"

namespace gloam {

// Null: dense.
using RowPolicies = std::span<const std::shared_ptr<const SparsityPolicy>>;

class ForcedDecoder {
 public:
  virtual ~ForcedDecoder() = default;

  // Forgets everything, prefills `context` densely, and makes a row per policy, the first of them
  // dense, which will be fed `tokens`. These must stay until the last step. The context's length is
  // a multiple of 16, so that the rows share its blocks. Errors: kInvalidArgument,
  // kResourceExhausted saying what does not fit.
  [[nodiscard]] virtual Status Start(std::span<const int32_t> context,
                                     std::span<const int32_t> tokens, RowPolicies policies) = 0;

  // One decode step of every row with the next token. Valid until the next call.
  struct Step {
    std::vector<std::span<const float>> logits;  // by row, [vocab_size]: of the token after it
    StepSparsity sparsity;                       // row.seq is the row less one: dense is not in it
  };
  virtual Step Next() = 0;
};

}  // namespace gloam
