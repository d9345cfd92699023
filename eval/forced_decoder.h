// ForcedDecoder: several rows that read the same context and are fed the same next tokens, each
// under a policy of its own, side by side in one batch. One thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/status.h"
#include "engine/sparsity.h"
#include "kernels/tensor_view.h"

namespace gloam {

// Null: dense.
using RowPolicies = std::span<const std::shared_ptr<const SparsityPolicy>>;

class ForcedDecoder {
 public:
  virtual ~ForcedDecoder() = default;

  // Forgets everything, prefills `context` densely, and makes a row per policy. The context's
  // length is a multiple of 16, so that the rows share its blocks. Errors: kInvalidArgument,
  // kResourceExhausted saying what does not fit.
  [[nodiscard]] virtual Status Start(std::span<const int32_t> context, RowPolicies policies) = 0;

  // One decode step of every row with `token`. Valid until the next call.
  struct Step {
    TensorView logits;      // [num_rows, vocab_size] fp32: of the token that comes next
    StepSparsity sparsity;  // row.seq is the row
  };
  virtual Step Feed(int32_t token) = 0;
};

}  // namespace gloam
