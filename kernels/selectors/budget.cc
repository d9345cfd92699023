#include "kernels/selectors/budget.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/sparse/top_k.h"
#include "kernels/estimate.h"

namespace gloam {

int64_t BudgetTokens(const SelectorConfig& config, int64_t context_len) {
  const double tokens = config.numbers[0];
  if (!std::isnan(tokens)) return static_cast<int64_t>(tokens);
  // 0.07 * 100 is a little more than 7 in double, and means 7.
  const double share = config.numbers[1] * static_cast<double>(context_len);
  return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(share - 1e-6)));
}

bool BudgetBinds(const SelectParams& params) {
  return BudgetTokens(*params.config, params.context_len) < params.context_len;
}

void KeepTopTokens(SelectParams& params, const float* scores) {
  const int64_t num_blocks = params.keys.num_blocks;
  const int64_t count = BudgetTokens(*params.config, params.context_len) - OpenTokens(params);
  for (int head = 0; head < params.num_heads; ++head) {
    cpu::KeepTopTokens(scores + head * num_blocks * kBlockTokens, count, num_blocks,
                       HeadMasks(params, head));
  }
}

void KeepTopLogits(SelectParams& params, const float* queries) {
  if (!BudgetBinds(params)) return;
  EstimateParams exact;
  exact.estimator.type = EstimatorType::kNone;
  exact.keys = params.keys;
  exact.queries = queries;
  exact.num_heads = params.num_heads;
  exact.head_dim = params.head_dim;
  exact.masks = params.masks;
  exact.logits = params.scratch;
  cpu::Estimate(exact);
  KeepTopTokens(params, params.scratch);
}

}  // namespace gloam
