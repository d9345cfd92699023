// The tokens with the largest exact logits: what no selector of the same budget can do better. It
// reads every key, so it saves nothing.
#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

constexpr NumberKey kKeys[] = {kTokenBudgetKey, kSparsityRateKey};

class OracleTopK final : public Selector {
 public:
  std::string_view name() const override { return "oracle_topk"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }
  void Select(SelectParams& params) const override { KeepTopLogits(params, params.queries); }
};

}  // namespace

const Selector& OracleTopKSelector() {
  static const OracleTopK selector;
  return selector;
}

}  // namespace gloam
