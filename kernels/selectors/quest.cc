// Quest (arXiv 2406.10774): blocks are judged by a bound of their logits, from the range of their
// keys in each channel. A policy may ask for a score nearer to the middle of the range, which ranks
// blocks better than the bound does.
#include <iterator>

#include "kernels/cpu/sparse/block_scores.h"
#include "kernels/cpu/sparse/top_k.h"
#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

enum Key { kChunkSize = kNumBudgetKeys, kRangeWeight };
constexpr NumberKey kKeys[] = {
    kTokenBudgetKey,
    kSparsityRateKey,
    // Ranges are kept per block of the cache, so that is the only size.
    {.name = "chunk_size",
     .min = kBlockTokens,
     .max = kBlockTokens,
     .use = KeyUse::kOptional,
     .default_value = kBlockTokens},
    // 1: the bound; 0: the middle of the range.
    {.name = "range_weight",
     .min = 0,
     .max = 1,
     .integer = false,
     .use = KeyUse::kOptional,
     .default_value = 1},
};
static_assert(std::size(kKeys) == kRangeWeight + 1);

// A piece of the scores takes a few microseconds.
constexpr int64_t kBlocksPerPiece = 64;

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
    params.loop.ForPieces(num_blocks, kBlocksPerPiece, [&](int64_t begin, int64_t end) {
      cpu::ScoreBlocks({.keys = params.keys,
                        .queries = params.queries,
                        .num_heads = params.num_heads,
                        .head_dim = params.head_dim,
                        .range_weight = static_cast<float>(params.config->numbers[kRangeWeight]),
                        .masks = params.masks,
                        .scores = params.scratch,
                        .begin_block = begin,
                        .end_block = end});
    });
    params.loop.For(params.num_heads, [&](int64_t head, int /*thread*/) {
      cpu::KeepTopBlocks(params.scratch + head * num_blocks * kBlockTokens, count, num_blocks,
                         HeadMasks(params, static_cast<int>(head)));
    });
  }
};

}  // namespace

const Selector& QuestSelector() {
  static const Quest selector;
  return selector;
}

}  // namespace gloam
