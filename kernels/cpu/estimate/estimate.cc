// Checks of the estimators' arguments; the loops are in block_quants.cc, token_quants.cc, keys.cc.
#include "kernels/estimate.h"

#include <algorithm>

#include "kernels/cpu/estimate/kernels.h"
#include "kernels/cpu/sidecars/quant_rows.h"

namespace gloam::cpu {
namespace {

void CheckKeys(const KeyBlocks& keys, int num_heads, int head_dim) {
  const KvLayout& layout = keys.kv.layout;
  GLOAM_CHECK(IsKvDType(layout.dtype, Device::kCpu) && layout.head_dim == head_dim);
  GLOAM_CHECK(head_dim % kQuantVectorChannels == 0 && head_dim <= kMaxSidecarHeadDim);
  GLOAM_CHECK(num_heads >= 0 && num_heads <= kMaxGroupHeads);
}

// Bits of a mirror that the server keeps.
int BitsOf(const SidecarConfig& config, SidecarKind kind) {
  switch (kind) {
    case SidecarKind::kBlockQuant:
      return config.block_quant_bits;
    case SidecarKind::kMinMaxQuant:
      return config.min_max_quant_bits;
    case SidecarKind::kMaxQuant:
      return config.max_quant_bits;
    default:
      return config.label_bits;
  }
}

SidecarKind MirrorKindOf(EstimatorType type) {
  switch (type) {
    case EstimatorType::kBlockQuant:
      return SidecarKind::kBlockQuant;
    case EstimatorType::kMinMaxQuant:
      return SidecarKind::kMinMaxQuant;
    default:  // kMaxQuant: kNone has no mirror
      return SidecarKind::kMaxQuant;
  }
}

}  // namespace

void Estimate(const EstimateParams& params) {
  CheckKeys(params.keys, params.num_heads, params.head_dim);
  const EstimateCall call = {.keys = &params.keys,
                             .queries = params.queries,
                             .num_heads = params.num_heads,
                             .channels = params.head_dim,
                             .masks = params.masks,
                             .logits = params.logits,
                             .begin_block = params.begin_block,
                             .end_block = std::min(params.end_block, params.keys.num_blocks)};
  if (params.estimator.type == EstimatorType::kNone) {
    EstimateFromKeys(call);
    return;
  }
  GLOAM_CHECK(params.keys.sidecars.config != nullptr);
  const SidecarKind kind = MirrorKindOf(params.estimator.type);
  const int bits = BitsOf(*params.keys.sidecars.config, kind);
  GLOAM_CHECK(bits == params.estimator.quant_bits && (bits == 2 || bits == 4 || bits == 8));
  const Mirror mirror = {kind, bits, NumQuantRows(params.head_dim, bits)};
  if (kind == SidecarKind::kBlockQuant) {
    EstimateFromBlockQuants(call, mirror);
  } else {
    EstimateFromTokenQuants(call, mirror);
  }
}

void EstimateFromLabels(const EstimateFromLabelsParams& params) {
  CheckKeys(params.keys, params.num_heads, params.head_dim);
  GLOAM_CHECK(params.keys.sidecars.config != nullptr);
  const SidecarConfig& config = *params.keys.sidecars.config;
  const int bits = config.label_bits;
  GLOAM_CHECK(bits == 2 || bits == 4 || bits == 8);
  const int num_labels = config.num_labels();
  const int padded = RoundUpChannels(num_labels);
  const int16_t* channels = config.label_channels->Head(params.layer, params.keys.kv_head);
  alignas(64) float queries[kMaxGroupHeads * kMaxSidecarHeadDim];
  for (int head = 0; head < params.num_heads; ++head) {
    const float* query = params.queries + head * params.head_dim;
    float* gathered = queries + head * padded;
    for (int i = 0; i < num_labels; ++i) gathered[i] = query[channels[i]];
    std::fill(gathered + num_labels, gathered + padded, 0.0f);
  }
  const EstimateCall call = {.keys = &params.keys,
                             .queries = queries,
                             .num_heads = params.num_heads,
                             .channels = padded,
                             .masks = params.masks,
                             .logits = params.logits,
                             .end_block = params.keys.num_blocks};
  EstimateFromTokenQuants(call, {SidecarKind::kLabels, bits, NumQuantRows(num_labels, bits)});
}

}  // namespace gloam::cpu
