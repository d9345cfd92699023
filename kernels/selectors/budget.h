// What selectors with a budget share: its two keys, and top-k by a row of scores. The budget is in
// tokens per query head and counts those of the open block, which the caller keeps.
#pragma once

#include <cstdint>

#include "kernels/selector.h"

namespace gloam {

// Exactly one is given. A selector that uses BudgetTokens lists them first, in this order.
inline constexpr NumberKey kTokenBudgetKey = {
    .name = "token_budget", .min = 1, .max = 1 << 24, .use = KeyUse::kOneOf};
// The share of the context that is kept.
inline constexpr NumberKey kSparsityRateKey = {
    .name = "sparsity_rate", .min = 1e-6, .max = 1, .integer = false, .use = KeyUse::kOneOf};
inline constexpr int kNumBudgetKeys = 2;

// Tokens of a context of `context_len` that the configuration asks for: at least 1; may be more
// than there are.
int64_t BudgetTokens(const SelectorConfig& config, int64_t context_len);

// Tokens of the open block.
inline int64_t OpenTokens(const SelectParams& params) {
  return params.context_len - params.keys.num_blocks * kBlockTokens;
}

inline TokenMask* HeadMasks(const SelectParams& params, int head) {
  return params.masks + head * params.keys.num_blocks;
}

// Whether the budget is too small to keep every token: if not, there is nothing to select.
bool BudgetBinds(const SelectParams& params);

// Narrows each head's mask to the tokens with its largest scores, `scores` being [num_heads]
// [16 * num_blocks], as many as the budget leaves beside the open block.
void KeepTopTokens(SelectParams& params, const float* scores);

// KeepTopTokens by queries . keys, with `queries` in the place of params.queries: reads every key
// of every block with a candidate.
void KeepTopLogits(SelectParams& params, const float* queries);

}  // namespace gloam
