#include "kernels/sidecars.h"

namespace gloam {
namespace {

// Quants are kept in rows of 64 bytes: 32 / bits channels of 16 tokens.
int64_t QuantBytes(int channels, int bits) {
  GLOAM_CHECK(bits == 2 || bits == 4 || bits == 8);
  const int per_row = 32 / bits;
  return int64_t{64} * ((channels + per_row - 1) / per_row);
}

constexpr int64_t kTokenScaleBytes = 64;  // fp16 scale[16], fp16 minimum[16]

int64_t RoundUpTo64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

bool Covers(const SidecarConfig& kept, const SidecarConfig& needed) {
  const auto covers = [](int kept_bits, int needed_bits) {
    return needed_bits == 0 || kept_bits == needed_bits;
  };
  return (kept.ranges || !needed.ranges) && (kept.mean_values || !needed.mean_values) &&
         covers(kept.block_quant_bits, needed.block_quant_bits) &&
         covers(kept.min_max_quant_bits, needed.min_max_quant_bits) &&
         covers(kept.max_quant_bits, needed.max_quant_bits) &&
         covers(kept.label_bits, needed.label_bits) &&
         (needed.label_bits == 0 || kept.label_channels == needed.label_channels);
}

int64_t SidecarBytes(SidecarKind kind, const SidecarConfig& config, const KvLayout& kv) {
  if (config.empty()) return 0;
  GLOAM_CHECK(IsKvDType(kv.dtype, Device::kCpu));
  GLOAM_CHECK(kv.head_dim > 0 && kv.head_dim % 16 == 0 && kv.head_dim <= kMaxSidecarHeadDim);
  const int64_t row_bytes = kv.head_dim * static_cast<int64_t>(DTypeBytes(kv.dtype));
  switch (kind) {
    case SidecarKind::kRanges:
      return config.ranges ? 2 * row_bytes : 0;
    case SidecarKind::kBlockQuant:
      if (config.block_quant_bits == 0) return 0;
      GLOAM_CHECK(config.ranges);
      return QuantBytes(kv.head_dim, config.block_quant_bits);
    case SidecarKind::kMinMaxQuant:
      if (config.min_max_quant_bits == 0) return 0;
      return kTokenScaleBytes + QuantBytes(kv.head_dim, config.min_max_quant_bits);
    case SidecarKind::kMaxQuant:
      if (config.max_quant_bits == 0) return 0;
      return kTokenScaleBytes + QuantBytes(kv.head_dim, config.max_quant_bits);
    case SidecarKind::kLabels:
      if (config.label_bits == 0) return 0;
      GLOAM_CHECK(config.label_channels != nullptr);
      GLOAM_CHECK(config.num_labels() > 0 && config.num_labels() <= kv.head_dim);
      return kTokenScaleBytes + QuantBytes(config.num_labels(), config.label_bits);
    case SidecarKind::kMeanValues:
      return config.mean_values ? RoundUpTo64(row_bytes) : 0;
  }
  return 0;
}

int64_t SidecarBlockBytes(const SidecarConfig& config, const KvLayout& kv) {
  int64_t bytes = 0;
  for (int i = 0; i < kNumSidecarKinds; ++i) {
    bytes += SidecarBytes(static_cast<SidecarKind>(i), config, kv);
  }
  return bytes * kv.num_kv_heads;
}

}  // namespace gloam
