#include "models/attention/sidecar_plan.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "base/check.h"
#include "kernels/selector.h"
#include "models/attention/policy_json.h"

namespace gloam {
namespace {

constexpr std::string_view kEstimatorKey = "weight_estimator.type";
constexpr std::string_view kEstimatorBitsKey = "weight_estimator.quant_bit";
constexpr std::string_view kSelectorKey = "selector.type";
constexpr std::string_view kLabelBits = "quant_bit";

struct QuantKind {
  int SidecarConfig::*bits;
  std::string_view what;
};
constexpr QuantKind kEstimatorKinds[] = {
    {&SidecarConfig::block_quant_bits, "keys quantised per block"},
    {&SidecarConfig::min_max_quant_bits, "keys quantised per token"},
    {&SidecarConfig::max_quant_bits, "keys quantised per token (symmetric)"}};

Status NotKept(std::string_view key, std::string_view what) {
  return PolicyKeyError(key, fmt::format("needs {}, which this server does not keep: start it with "
                                         "--sparsity-policies naming a policy that needs them too",
                                         what));
}

Status OtherShape(std::string_view key, std::string_view what, int kept) {
  return PolicyKeyError(
      key, fmt::format("must be {}: the server keeps {} once, and another policy comes first "
                       "(--sparsity-policies)",
                       kept, what));
}

std::string LabelBitsKey(const Selector& selector) {
  for (const NumberKey& key : selector.number_keys()) {
    if (key.name == kLabelBits) return fmt::format("selector.{}", key.name);
  }
  return std::string(kSelectorKey);
}

// The shape of what the selector reads, against what is kept.
Status CheckLabels(const Selector& selector, const SidecarConfig& need, const SidecarConfig& kept) {
  if (need.label_bits == 0 || kept.label_bits == 0) return OkStatus();
  if (need.label_bits != kept.label_bits) {
    return OtherShape(LabelBitsKey(selector), "label channels", kept.label_bits);
  }
  const ChannelTable& wanted = *need.label_channels;
  const ChannelTable& there = *kept.label_channels;
  if (&wanted == &there) return OkStatus();
  const ChannelFileKeys* keys = selector.channel_file_keys();
  GLOAM_CHECK(keys != nullptr);
  if (wanted.num_channels != there.num_channels) {
    return OtherShape(fmt::format("selector.{}", keys->count), "label channels",
                      there.num_channels);
  }
  if (wanted.channels != there.channels) {
    return PolicyKeyError(fmt::format("selector.{}", keys->path),
                          "names other channels than those that the server keeps for another "
                          "policy that comes first (--sparsity-policies)");
  }
  return OkStatus();
}

// Errors for what is kept in another shape.
Status CheckShapes(const SparsityPolicy& policy, const SidecarConfig& need,
                   const SidecarConfig& kept) {
  for (const QuantKind& kind : kEstimatorKinds) {
    const int wanted = need.*kind.bits;
    const int there = kept.*kind.bits;
    if (wanted != 0 && there != 0 && wanted != there) {
      return OtherShape(kEstimatorBitsKey, kind.what, there);
    }
  }
  return CheckLabels(*policy.selector.selector, need, kept);
}

}  // namespace

Status AddSidecars(const SparsityPolicy& policy, SidecarConfig* kept) {
  const SidecarConfig need = SidecarsOf(policy);
  GLOAM_RETURN_IF_ERROR(CheckShapes(policy, need, *kept));
  for (const QuantKind& kind : kEstimatorKinds) {
    kept->*kind.bits = std::max(kept->*kind.bits, need.*kind.bits);
  }
  if (need.label_bits != 0 && kept->label_bits == 0) {
    kept->label_bits = need.label_bits;
    kept->label_channels = need.label_channels;
  }
  kept->ranges |= need.ranges;
  kept->mean_values |= need.mean_values;
  return OkStatus();
}

Status CheckSidecars(const SparsityPolicy& policy, const SidecarConfig& kept) {
  const SidecarConfig need = SidecarsOf(policy);
  GLOAM_RETURN_IF_ERROR(CheckShapes(policy, need, kept));
  for (const QuantKind& kind : kEstimatorKinds) {
    if (need.*kind.bits > kept.*kind.bits) return NotKept(kEstimatorKey, kind.what);
  }
  if (need.label_bits > kept.label_bits) return NotKept(kSelectorKey, "label channels");
  if (need.ranges && !kept.ranges) return NotKept(kSelectorKey, "the ranges of each block's keys");
  if (need.mean_values && !kept.mean_values) {
    return NotKept("tail", "the mean values of blocks");
  }
  return OkStatus();
}

}  // namespace gloam
