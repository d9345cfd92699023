// TidalDecode (arXiv 2410.05076): the tokens with the largest exact logits are found in some
// layers, and the layers after each of them use what it has found.
#include <algorithm>

#include "base/check.h"
#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

constexpr NumberKey kKeys[] = {kTokenBudgetKey, kSparsityRateKey};

class TidalDecode final : public Selector {
 public:
  std::string_view name() const override { return "tidal_decode"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }
  std::string_view layer_list_key() const override { return "reselection_layers"; }

  void Select(SelectParams& params) const override {
    const std::vector<int>& layers = params.config->layers;
    // Layers before the first of the list select for themselves. A layer after it that finds
    // nothing remembered follows dense ones: it stands in for the layer of the list among them.
    const bool is_before = layers.empty() || params.layer < layers.front();
    const bool is_listed = std::binary_search(layers.begin(), layers.end(), params.layer);
    if (!is_before && !is_listed && !params.remembered.empty()) {
      const int64_t num_masks = params.num_heads * params.keys.num_blocks;
      GLOAM_CHECK(static_cast<int64_t>(params.remembered.size()) == num_masks);
      for (int64_t i = 0; i < num_masks; ++i) params.masks[i] &= params.remembered[i];
      return;
    }
    KeepTopLogits(params, params.queries);
    params.remember = !is_before;
  }
};

}  // namespace

const Selector& TidalDecodeSelector() {
  static const TidalDecode selector;
  return selector;
}

}  // namespace gloam
