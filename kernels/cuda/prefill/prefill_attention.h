// Attention of the sequences that have more than one token in a step. Owned by the attention
// backend (attention.cc), which sends single tokens to decode_attention.h; engine thread only.
#pragma once

#include <memory>
#include <span>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace gloam::cuda {

class PrefillAttention {
 public:
  static std::unique_ptr<PrefillAttention> Make(const DeviceContext& context);
  virtual ~PrefillAttention() = default;

  // Makes room for steps up to `limits`. Errors: kResourceExhausted with the size.
  [[nodiscard]] virtual Status Reserve(const StepLimits& limits) = 0;
  // Plans on the host, once per forward pass, for the sequences `seqs` (indices into the batch,
  // ascending, at least one).
  virtual void Plan(const AttentionPlanParams& params, std::span<const int> seqs) = 0;
  // One layer: writes the rows of `params.out` of the planned sequences and no others.
  virtual void Run(const AttentionParams& params) = 0;
};

}  // namespace gloam::cuda
