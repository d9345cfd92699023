// Double Sparsity (arXiv 2408.07092): logits from a few calibrated channels of each head, whose
// keys are kept aside, quantised.
#include "kernels/estimate.h"
#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

enum Key { kChannels = kNumBudgetKeys, kQuantBits };
constexpr double kLabelBits[] = {2, 4, 8};
constexpr NumberKey kKeys[] = {
    kTokenBudgetKey,
    kSparsityRateKey,
    {.name = "r", .min = 1, .max = 1024},
    {.name = "quant_bit",
     .min = 2,
     .max = 8,
     .use = KeyUse::kOptional,
     .default_value = 4,
     .allowed = kLabelBits},
};
constexpr ChannelFileKeys kChannelFile = {
    .path = "config_path", .projection = "selected_channel", .count = "r"};

class DoubleSparsity final : public Selector {
 public:
  std::string_view name() const override { return "ds"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }
  const ChannelFileKeys* channel_file_keys() const override { return &kChannelFile; }
  void AddSidecars(const SelectorConfig& config, SidecarConfig& sidecars) const override {
    sidecars.label_bits = static_cast<int>(config.numbers[kQuantBits]);
    sidecars.label_channels = config.channels;
  }

  void Select(SelectParams& params) const override {
    if (!BudgetBinds(params)) return;
    EstimateFromLabelsParams labels;
    labels.keys = params.keys;
    labels.layer = params.layer;
    labels.queries = params.queries;
    labels.num_heads = params.num_heads;
    labels.head_dim = params.head_dim;
    labels.masks = params.masks;
    labels.logits = params.scratch;
    cpu::EstimateFromLabels(labels);
    KeepTopTokens(params, params.scratch);
  }
};

}  // namespace

const Selector& DoubleSparsitySelector() {
  static const DoubleSparsity selector;
  return selector;
}

}  // namespace gloam
