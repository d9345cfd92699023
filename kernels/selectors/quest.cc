// Quest (arXiv 2406.10774): blocks are judged by a bound of their logits, from the range of their
// keys in each channel.
#include "kernels/cpu/block_scores.h"
#include "kernels/cpu/top_k.h"
#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

constexpr NumberKey kKeys[] = {
    kTokenBudgetKey,
    kSparsityRateKey,
    // Ranges are kept per block of the cache, so that is the only size.
    {.name = "chunk_size",
     .min = kBlockTokens,
     .max = kBlockTokens,
     .use = KeyUse::kOptional,
     .default_value = kBlockTokens},
};

class Quest final : public Selector {
 public:
  std::string_view name() const override { return "quest"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }
  void AddSidecars(const SelectorConfig& /*config*/, SidecarConfig& sidecars) const override {
    sidecars.ranges = true;
  }

  void Select(SelectParams& params) const override {
    if (!BudgetBinds(params)) return;
    const int64_t num_blocks = params.keys.num_blocks;
    const int64_t budget = BudgetTokens(*params.config, params.context_len);
    // The newest block, which is open, is one of them.
    const int64_t count = (budget + kBlockTokens - 1) / kBlockTokens - 1;
    if (count >= num_blocks) return;
    cpu::ScoreBlocks(params.keys, params.queries, params.num_heads, params.head_dim, params.masks,
                     params.scratch);
    for (int head = 0; head < params.num_heads; ++head) {
      cpu::KeepTopBlocks(params.scratch + head * num_blocks * kBlockTokens, count, num_blocks,
                         HeadMasks(params, head));
    }
  }
};

}  // namespace

const Selector& QuestSelector() {
  static const Quest selector;
  return selector;
}

}  // namespace gloam
