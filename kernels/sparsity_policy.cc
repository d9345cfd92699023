#include "kernels/sparsity_policy.h"

#include "base/check.h"
#include "kernels/selector.h"

namespace gloam {

SidecarConfig SidecarsOf(const SparsityPolicy& policy) {
  SidecarConfig sidecars;
  GLOAM_CHECK(policy.selector.selector != nullptr);
  policy.selector.selector->AddSidecars(policy.selector, sidecars);
  switch (policy.estimator.type) {
    case EstimatorType::kNone:
      break;
    case EstimatorType::kMinMaxQuant:
      sidecars.min_max_quant_bits = policy.estimator.quant_bits;
      break;
    case EstimatorType::kMaxQuant:
      sidecars.max_quant_bits = policy.estimator.quant_bits;
      break;
    case EstimatorType::kBlockQuant:
      sidecars.ranges = true;
      sidecars.block_quant_bits = policy.estimator.quant_bits;
      break;
  }
  if (policy.tail == TailType::kBlockMean) sidecars.mean_values = true;
  return sidecars;
}

}  // namespace gloam
