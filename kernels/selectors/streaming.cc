// The first tokens and the last ones (StreamingLLM, arXiv 2309.17453).
#include <algorithm>

#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

enum Key { kNumSinks, kTokenBudget };
constexpr NumberKey kKeys[] = {
    // Four: what the source uses; with fewer its perplexities rise.
    {.name = "num_sinks", .min = 0, .max = 1 << 24, .use = KeyUse::kOptional, .default_value = 4},
    {.name = "token_budget", .min = 1, .max = 1 << 24},
};

// Tokens [begin, end) of one block; both may lie outside it.
TokenMask TokenRange(int64_t begin, int64_t end) {
  const auto below = [](int64_t token) {
    return (uint32_t{1} << std::clamp<int64_t>(token, 0, kBlockTokens)) - 1;
  };
  return static_cast<TokenMask>(below(end) & ~below(begin));
}

class Streaming final : public Selector {
 public:
  std::string_view name() const override { return "streaming"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }

  void Select(SelectParams& params) const override {
    const auto num_sinks = static_cast<int64_t>(params.config->numbers[kNumSinks]);
    const auto budget = static_cast<int64_t>(params.config->numbers[kTokenBudget]);
    const int64_t first_recent = params.context_len - budget;
    for (int64_t block = 0; block < params.keys.num_blocks; ++block) {
      const int64_t first = block * kBlockTokens;
      const TokenMask kept =
          TokenRange(0, num_sinks - first) | TokenRange(first_recent - first, kBlockTokens);
      for (int head = 0; head < params.num_heads; ++head) HeadMasks(params, head)[block] &= kept;
    }
  }
};

}  // namespace

const Selector& StreamingSelector() {
  static const Streaming selector;
  return selector;
}

}  // namespace gloam
