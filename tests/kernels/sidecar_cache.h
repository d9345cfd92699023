// A small paged cache with sidecars, for tests: keys and values are written one by one, steps are
// run over any chunks, and quants are read back by the layout's definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/float16.h"
#include "kernels/sidecars.h"

namespace gloam::cpu {

// 64-byte aligned bytes, each 0xA5.
class AlignedBytes {
 public:
  explicit AlignedBytes(int64_t bytes) : storage_(bytes + 64, std::byte{0xA5}), bytes_(bytes) {}
  std::byte* data() {
    return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 *
                                        64);
  }
  std::vector<std::byte> copy() { return {data(), data() + bytes_}; }

 private:
  std::vector<std::byte> storage_;
  int64_t bytes_;
};

// Every kind, all with the same number of bits.
inline SidecarConfig EveryKind(int bits, int head_dim, int num_kv_heads, int num_labels,
                               std::mt19937& rng) {
  SidecarConfig config;
  config.ranges = config.mean_values = true;
  config.block_quant_bits = config.min_max_quant_bits = config.max_quant_bits = bits;
  config.label_bits = bits;
  auto table = std::make_shared<ChannelTable>();
  table->num_layers = 2;
  table->num_kv_heads = num_kv_heads;
  table->num_channels = num_labels;
  for (int i = 0; i < 2 * num_kv_heads; ++i) {
    std::vector<int16_t> channels(head_dim);
    std::iota(channels.begin(), channels.end(), int16_t{0});
    std::shuffle(channels.begin(), channels.end(), rng);
    table->channels.insert(table->channels.end(), channels.begin(), channels.begin() + num_labels);
  }
  config.label_channels = table;
  return config;
}

struct SidecarCache {
  KvLayerView kv;
  SidecarConfig config;
  SidecarLayerView sidecars;
  int layer = 1;
  AlignedBytes kv_memory;
  std::vector<AlignedBytes> sidecar_memory;

  SidecarCache(const KvLayout& layout, const SidecarConfig& c, int64_t num_blocks)
      : config(c), kv_memory(layout.block_bytes() * num_blocks) {
    kv.layout = layout;
    kv.num_blocks = num_blocks;
    kv.data = kv_memory.data();
    sidecars.config = &config;
    sidecars.num_kv_heads = layout.num_kv_heads;
    sidecars.num_blocks = num_blocks;
    sidecar_memory.reserve(kNumSidecarKinds);
    for (int k = 0; k < kNumSidecarKinds; ++k) {
      sidecars.head_bytes[k] = SidecarBytes(static_cast<SidecarKind>(k), config, layout);
      sidecar_memory.emplace_back(sidecars.head_bytes[k] * layout.num_kv_heads * num_blocks);
      sidecars.data[k] = sidecar_memory.back().data();
    }
  }
  SidecarCache(const SidecarCache&) = delete;
  SidecarCache& operator=(const SidecarCache&) = delete;

  float Read(const void* data, int64_t i) const {
    switch (kv.layout.dtype) {
      case DType::kBF16:
        return FloatFromBf16(static_cast<const uint16_t*>(data)[i]);
      case DType::kF16:
        return F16ToF32(static_cast<const uint16_t*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
  void Write(int64_t i, float value) {
    if (kv.layout.dtype == DType::kBF16) {
      static_cast<uint16_t*>(kv.data)[i] = Bf16FromFloat(value);
    } else if (kv.layout.dtype == DType::kF16) {
      static_cast<uint16_t*>(kv.data)[i] = F32ToF16(std::clamp(value, -65504.0f, 65504.0f));
    } else {
      static_cast<float*>(kv.data)[i] = value;
    }
  }
  int64_t IndexOf(bool value, int64_t block, int head, int token, int c) const {
    const int64_t run = (block * 2 + (value ? 1 : 0)) * kv.layout.num_kv_heads + head;
    return (run * kBlockTokens + token) * kv.layout.head_dim + c;
  }
  double Key(int64_t block, int head, int token, int c) const {
    return Read(kv.data, IndexOf(false, block, head, token, c));
  }
  double Value(int64_t block, int head, int token, int c) const {
    return Read(kv.data, IndexOf(true, block, head, token, c));
  }
  double Min(int64_t block, int head, int c) const {
    return Read(sidecars.At(SidecarKind::kRanges, block, head), c);
  }
  double Max(int64_t block, int head, int c) const {
    return Read(sidecars.At(SidecarKind::kRanges, block, head), kv.layout.head_dim + c);
  }
  // By the definition of kernels/cpu/quant_rows.h.
  int Quant(SidecarKind kind, int64_t block, int head, int bits, int token, int c) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(sidecars.At(kind, block, head));
    if (kind != SidecarKind::kBlockQuant) bytes += 64;
    const int fields = 8 / bits;
    const int row = c / 4 / fields;
    const int field = c / 4 % fields;
    return bytes[row * 64 + 4 * token + c % 4] >> (field * bits) & ((1 << bits) - 1);
  }
  double TokenScale(SidecarKind kind, int64_t block, int head, int token) const {
    return F16ToF32(reinterpret_cast<const uint16_t*>(sidecars.At(kind, block, head))[token]);
  }
  double TokenMinimum(SidecarKind kind, int64_t block, int head, int token) const {
    return F16ToF32(reinterpret_cast<const uint16_t*>(sidecars.At(kind, block, head))[16 + token]);
  }
  // Channel c (label c) of a token as the sidecar of the kind has it.
  double Dequantised(SidecarKind kind, int64_t block, int head, int token, int c) const {
    const int bits = config.block_quant_bits;
    const int quant = Quant(kind, block, head, bits, token, c);
    if (kind == SidecarKind::kBlockQuant) {
      const double min = Min(block, head, c);
      return min + quant * (Max(block, head, c) - min) / ((1 << bits) - 1);
    }
    const double scale = TokenScale(kind, block, head, token);
    if (kind == SidecarKind::kMaxQuant) return (quant - (1 << (bits - 1))) * scale;
    return TokenMinimum(kind, block, head, token) + quant * scale;
  }

  // One step: sequence s has the tokens [begins[s], ends[s]) of the blocks tables[s].
  void Update(const std::vector<std::vector<int32_t>>& tables, const std::vector<int>& begins,
              const std::vector<int>& ends, ThreadPool& pool) {
    std::vector<int32_t> positions, cu_seqlens = {0}, context_lens, block_tables;
    size_t max_blocks = 0;
    for (const auto& table : tables) max_blocks = std::max(max_blocks, table.size());
    for (size_t seq = 0; seq < tables.size(); ++seq) {
      for (int p = begins[seq]; p < ends[seq]; ++p) positions.push_back(p);
      cu_seqlens.push_back(static_cast<int32_t>(positions.size()));
      context_lens.push_back(ends[seq]);
      std::vector<int32_t> table = tables[seq];
      table.resize(max_blocks, -1);
      block_tables.insert(block_tables.end(), table.begin(), table.end());
    }
    UpdateSidecarsParams params;
    params.batch.num_seqs = static_cast<int>(tables.size());
    params.batch.num_tokens = static_cast<int>(positions.size());
    params.batch.max_blocks_per_seq = static_cast<int>(max_blocks);
    params.batch.positions = positions.data();
    params.batch.cu_seqlens = cu_seqlens.data();
    params.batch.context_lens = context_lens.data();
    params.batch.block_tables = block_tables.data();
    params.kv = kv;
    params.sidecars = sidecars;
    params.layer = layer;
    UpdateSidecars(params, pool);
  }
  // Blocks 0, 1, ... as one sequence in one step.
  void UpdateAll(ThreadPool& pool) {
    std::vector<int32_t> table(kv.num_blocks);
    std::iota(table.begin(), table.end(), 0);
    Update({table}, {0}, {static_cast<int>(kv.num_blocks) * kBlockTokens}, pool);
  }
  std::vector<std::vector<std::byte>> Contents() {
    std::vector<std::vector<std::byte>> contents;
    for (AlignedBytes& memory : sidecar_memory) contents.push_back(memory.copy());
    return contents;
  }
};

}  // namespace gloam::cpu
