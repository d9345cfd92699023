// Sidecars: what is kept beside each full block of the KV cache so that sparse attention can judge
// its tokens without reading them. They live under the block's id, so sharing a prefix, freeing
// and pre-empting carry them along. A block's sidecars are computed once, in the step in which the
// block fills; those of a block that is still open are undefined.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/paged_kv.h"

namespace gloam {

// Calibrated channels of Double Sparsity: per layer and KV head, channels of K, best first.
struct ChannelTable {
  std::string source;  // the file, for messages
  int num_layers = 0;
  int num_kv_heads = 0;
  int num_channels = 0;           // per head
  std::vector<int16_t> channels;  // [num_layers][num_kv_heads][num_channels]

  const int16_t* Head(int layer, int kv_head) const {
    return channels.data() + (int64_t{layer} * num_kv_heads + kv_head) * num_channels;
  }
};

enum class SidecarKind : uint8_t {
  kRanges,       // per channel the minimum and the maximum of the block's keys
  kBlockQuant,   // keys quantised per channel within the block; the ranges are the scales
  kMinMaxQuant,  // keys quantised per token: scale and minimum per token
  kMaxQuant,     // keys quantised per token, symmetric: scale per token
  kLabels,       // keys on the calibrated channels, quantised per token with scale and minimum
  kMeanValues,   // mean of the block's values
};
inline constexpr int kNumSidecarKinds = 6;

// Which sidecars a policy needs, or a server keeps.
struct SidecarConfig {
  bool ranges = false;
  int block_quant_bits = 0;                            // 2, 4 or 8; 0: none. Needs ranges
  int min_max_quant_bits = 0;                          // 2, 4 or 8; 0: none
  int max_quant_bits = 0;                              // 2, 4 or 8; 0: none
  int label_bits = 0;                                  // 2, 4 or 8; 0: none
  std::shared_ptr<const ChannelTable> label_channels;  // with label_bits
  bool mean_values = false;

  bool empty() const {
    return !ranges && block_quant_bits == 0 && min_max_quant_bits == 0 && max_quant_bits == 0 &&
           label_bits == 0 && !mean_values;
  }
  int num_labels() const { return label_bits == 0 ? 0 : label_channels->num_channels; }
};

// Most channels of a head that sidecars are made for.
inline constexpr int kMaxSidecarHeadDim = 256;

// Whether a cache that keeps `kept` has all that a policy with `needed` reads.
bool Covers(const SidecarConfig& kept, const SidecarConfig& needed);

// Bytes of one block and KV head, by kind; each a multiple of 64, zero for kinds not kept. With d
// channels and b bits, 16 tokens:
//   kRanges       [2][d] of the cache's type: minima, then maxima (exact: they are elements)
//   kBlockQuant   d * 16 * b / 8 bytes of quants
//   kMinMaxQuant  fp16 scale[16], fp16 minimum[16], then d * 16 * b / 8 bytes of quants
//   kMaxQuant     fp16 scale[16], then (from byte 64) d * 16 * b / 8 bytes of quants
//   kLabels       as kMinMaxQuant over num_labels channels, in whole rows of 64 bytes
//   kMeanValues   [d] of the cache's type
// The order of the quants within a kind is the backend's own (the CPU's:
// kernels/cpu/sidecars/quant_rows.h).
//
// What a key k is kept as, and how far k~ may be off it, rounding of fp32 aside (2^-14 of a step):
//   per channel of a block  k~ = min + n * step, step = (max - min) / (2^b - 1): step / 2
//   per token               k~ = minimum + n * scale, scale >= (max - minimum) / (2^b - 1), minimum
//                           rounded down to fp16 and scale up: scale / 2, where scale is at most
//                           2^-10 of itself and 2^-10 |minimum| / (2^b - 1) + 2^-24 above the ideal
//   per token, symmetric    k~ = n * scale, scale >= max |k| / (2^(b-1) - 1), rounded up: scale / 2
// Per token, keys past the largest fp16 saturate: scale and minimum stay finite.
//
// CHECKs that the configuration is one that a backend can keep: bits of 2, 4 or 8, channels per
// head a multiple of 16 and at most kMaxSidecarHeadDim, labels with their channels.
int64_t SidecarBytes(SidecarKind kind, const SidecarConfig& config, const KvLayout& kv);
// Sum over kinds and KV heads: what one block costs beside its keys and values, in one layer.
int64_t SidecarBlockBytes(const SidecarConfig& config, const KvLayout& kv);

// One layer's sidecars: per kind an array [num_kv_heads][num_blocks][head_bytes], so that a head's
// scan over the context reads one long run wherever the blocks follow each other. The memory
// belongs to the engine's KvCachePool. Null `config`: the server keeps none.
struct SidecarLayerView {
  const SidecarConfig* config = nullptr;
  std::array<std::byte*, kNumSidecarKinds> data = {};
  std::array<int64_t, kNumSidecarKinds> head_bytes = {};
  int num_kv_heads = 0;
  int64_t num_blocks = 0;  // of the cache

  std::byte* At(SidecarKind kind, int64_t block, int kv_head) const {
    const int i = static_cast<int>(kind);
    return data[i] + (kv_head * num_blocks + block) * head_bytes[i];
  }
};

// Computes the sidecars of every block that this step's tokens fill; other blocks stay as they are.
// The step's keys and values are in the cache. A block's sidecars depend on its own keys and values
// alone.
struct UpdateSidecarsParams {
  SequenceBatch batch;
  KvLayerView kv;
  SidecarLayerView sidecars;
  int layer = 0;  // for the calibrated channels
};

}  // namespace gloam
