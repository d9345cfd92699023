// Sidecars of the blocks that fill in a step: one task per block and KV head, from the block's keys
// and values to its arrays. Most decode steps fill nothing.
#include "kernels/sidecars.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/row_tasks.h"
#include "kernels/cpu/sidecars/quant_rows.h"
#include "kernels/cpu/sidecars/quantize_keys.h"
#include "kernels/float16.h"

namespace gloam::cpu {
namespace {

// Elements of keys and values that one thread handles in about 5 us.
constexpr int64_t kGrainElements = 1 << 13;

constexpr float kMaxF16 = 65504.0f;
constexpr int kMaxRunElements = kBlockTokens * kMaxSidecarHeadDim;

// The largest fp16 that is not above x, and the smallest that is not below; x past the largest
// fp16 gives the largest.
uint16_t RoundDownToF16(float x) {
  x = std::clamp(x, -kMaxF16, kMaxF16);
  const uint16_t nearest = F32ToF16(x);
  if (!(F16ToF32(nearest) > x)) return nearest;
  return static_cast<uint16_t>((nearest & 0x8000) != 0 ? nearest + 1 : nearest - 1);
}

uint16_t RoundUpToF16(float x) { return RoundDownToF16(-x) ^ 0x8000; }

void StoreRow(const float* from, int count, DType dtype, std::byte* to) {
  if (dtype == DType::kF32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* out = reinterpret_cast<uint16_t*>(to);
  if (dtype == DType::kBF16) {
    for (int i = 0; i < count; ++i) out[i] = Bf16FromFloat(from[i]);
  } else {
    for (int i = 0; i < count; ++i) out[i] = F32ToF16(from[i]);
  }
}

// quants [16][stride] to the rows of quant_rows.h.
void PackQuants(const uint8_t* quants, int stride, int num_rows, int bits, std::byte* rows) {
  const int fields = 8 / bits;
  for (int row = 0; row < num_rows; ++row) {
    for (int token = 0; token < kBlockTokens; ++token) {
      uint32_t word = 0;
      for (int f = 0; f < fields; ++f) {
        uint32_t quad;
        std::memcpy(&quad, quants + token * stride + (row * fields + f) * 4, sizeof(quad));
        word |= quad << (f * bits);
      }
      std::memcpy(rows + row * kQuantRowBytes + token * 4, &word, sizeof(word));
    }
  }
}

// One block and KV head.
class BlockSidecars {
 public:
  BlockSidecars(const UpdateSidecarsParams& params, int64_t block, int kv_head)
      : params_(params), config_(*params.sidecars.config), block_(block), kv_head_(kv_head) {}

  void Compute() {
    const KvLayout& layout = params_.kv.layout;
    if (config_.mean_values) {
      ConvertToF32(Run(/*values=*/true), layout.dtype, layout.head_run_elements(), rows_);
      ChannelMeans(rows_, layout.head_dim, min_);
      StoreRow(min_, layout.head_dim, layout.dtype, At(SidecarKind::kMeanValues));
    }
    ConvertToF32(Run(/*values=*/false), layout.dtype, layout.head_run_elements(), rows_);
    if (config_.ranges) StoreRanges();
    if (config_.min_max_quant_bits != 0) {
      StoreMinMaxQuants(rows_, layout.head_dim, layout.head_dim, config_.min_max_quant_bits,
                        At(SidecarKind::kMinMaxQuant));
    }
    if (config_.max_quant_bits != 0) StoreMaxQuants();
    if (config_.label_bits != 0) StoreLabels();
  }

 private:
  const std::byte* Run(bool values) const {
    const KvLayout& layout = params_.kv.layout;
    const int64_t run = (block_ * 2 + (values ? 1 : 0)) * layout.num_kv_heads + kv_head_;
    return static_cast<const std::byte*>(params_.kv.data) +
           run * layout.head_run_elements() * static_cast<int64_t>(DTypeBytes(layout.dtype));
  }
  std::byte* At(SidecarKind kind) const { return params_.sidecars.At(kind, block_, kv_head_); }

  void StoreRanges() {
    const KvLayout& layout = params_.kv.layout;
    const int head_dim = layout.head_dim;
    ChannelRanges(rows_, head_dim, min_, max_);
    std::byte* ranges = At(SidecarKind::kRanges);
    StoreRow(min_, head_dim, layout.dtype, ranges);
    StoreRow(max_, head_dim, layout.dtype,
             ranges + head_dim * static_cast<int64_t>(DTypeBytes(layout.dtype)));
    const int bits = config_.block_quant_bits;
    if (bits == 0) return;
    QuantizePerChannel(rows_, head_dim, min_, max_, (1 << bits) - 1, quants_);
    PackQuants(quants_, head_dim, NumQuantRows(head_dim, bits), bits, At(SidecarKind::kBlockQuant));
  }

  // x is [16][stride], of which the first `channels` are packed.
  void StoreMinMaxQuants(const float* x, int stride, int channels, int bits, std::byte* out) {
    TokenRanges(x, stride, min_, max_);
    TokenQuantizer quantizer;
    quantizer.high = (1 << bits) - 1;
    uint16_t scales[kBlockTokens], minima[kBlockTokens];
    for (int token = 0; token < kBlockTokens; ++token) {
      minima[token] = RoundDownToF16(min_[token]);
      quantizer.base[token] = F16ToF32(minima[token]);
      const float range = max_[token] - quantizer.base[token];
      scales[token] = ScaleOf(range / static_cast<float>(quantizer.high));
      quantizer.step[token] = F16ToF32(scales[token]);
    }
    std::memcpy(out, scales, sizeof(scales));
    std::memcpy(out + kTokenMinimumOffset, minima, sizeof(minima));
    QuantizePerToken(x, stride, quantizer, quants_);
    PackQuants(quants_, stride, NumQuantRows(channels, bits), bits, out + kTokenQuantOffset);
  }

  void StoreMaxQuants() {
    const int head_dim = params_.kv.layout.head_dim;
    const int bits = config_.max_quant_bits;
    std::byte* out = At(SidecarKind::kMaxQuant);
    TokenRanges(rows_, head_dim, min_, max_);
    TokenQuantizer quantizer;
    quantizer.offset = 1 << (bits - 1);
    quantizer.high = quantizer.offset - 1;
    quantizer.low = -quantizer.high;
    uint16_t scales[kBlockTokens];
    for (int token = 0; token < kBlockTokens; ++token) {
      const float largest = std::max(max_[token], -min_[token]);
      scales[token] = ScaleOf(largest / static_cast<float>(quantizer.high));
      quantizer.base[token] = 0;
      quantizer.step[token] = F16ToF32(scales[token]);
    }
    std::memcpy(out, scales, sizeof(scales));
    std::memset(out + kTokenMinimumOffset, 0, kTokenQuantOffset - kTokenMinimumOffset);
    QuantizePerToken(rows_, head_dim, quantizer, quants_);
    PackQuants(quants_, head_dim, NumQuantRows(head_dim, bits), bits, out + kTokenQuantOffset);
  }

  void StoreLabels() {
    const int num_labels = config_.num_labels();
    const int padded = RoundUpChannels(num_labels);
    const int head_dim = params_.kv.layout.head_dim;
    const int16_t* channels = config_.label_channels->Head(params_.layer, kv_head_);
    for (int token = 0; token < kBlockTokens; ++token) {
      for (int i = 0; i < padded; ++i) {
        const int channel = channels[i < num_labels ? i : 0];
        GLOAM_CHECK(channel >= 0 && channel < head_dim);
        labels_[token * padded + i] = rows_[token * head_dim + channel];
      }
    }
    StoreMinMaxQuants(labels_, padded, num_labels, config_.label_bits, At(SidecarKind::kLabels));
  }

  // Never zero: quants are quotients.
  static uint16_t ScaleOf(float ideal) { return RoundUpToF16(std::max(ideal, 1e-9f)); }

  const UpdateSidecarsParams& params_;
  const SidecarConfig& config_;
  const int64_t block_;
  const int kv_head_;
  float rows_[kMaxRunElements];  // values, then keys
  float labels_[kMaxRunElements];
  float min_[kMaxSidecarHeadDim];
  float max_[kMaxSidecarHeadDim];
  uint8_t quants_[kMaxRunElements];
};

// The blocks of its table that a sequence fills in the step: [begin, end).
struct FilledBlocks {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t count() const { return end - begin; }
};

FilledBlocks FilledBlocksOf(const SequenceBatch& batch, int seq) {
  const int64_t begin = batch.cu_seqlens[seq];
  const int64_t num_tokens = batch.cu_seqlens[seq + 1] - begin;
  if (num_tokens == 0) return {};
  const int64_t position = batch.positions[begin];  // tokens of a sequence are consecutive
  return {position / kBlockTokens, (position + num_tokens) / kBlockTokens};
}

void CheckParams(const UpdateSidecarsParams& params) {
  const KvLayout& layout = params.kv.layout;
  GLOAM_CHECK(params.sidecars.num_kv_heads == layout.num_kv_heads);
  GLOAM_CHECK(params.sidecars.num_blocks == params.kv.num_blocks);
  for (int i = 0; i < kNumSidecarKinds; ++i) {
    const int64_t bytes =
        SidecarBytes(static_cast<SidecarKind>(i), *params.sidecars.config, layout);
    GLOAM_CHECK(bytes == 0 ||
                (params.sidecars.data[i] != nullptr && params.sidecars.head_bytes[i] == bytes));
  }
}

}  // namespace

void UpdateSidecars(const UpdateSidecarsParams& params, ThreadPool& pool) {
  const SidecarConfig* config = params.sidecars.config;
  if (config == nullptr || config->empty()) return;
  const SequenceBatch& batch = params.batch;
  int64_t num_blocks = 0;
  for (int seq = 0; seq < batch.num_seqs; ++seq) num_blocks += FilledBlocksOf(batch, seq).count();
  if (num_blocks == 0) return;
  CheckParams(params);

  const KvLayout& layout = params.kv.layout;
  const int64_t num_heads = layout.num_kv_heads;
  ForRows(pool, num_blocks * num_heads, 2 * layout.head_run_elements(), kGrainElements,
          [&](int64_t begin, int64_t end) {
            int64_t first = 0;  // of the sequence's, in the numbering of all blocks and heads
            for (int seq = 0; seq < batch.num_seqs && first < end; ++seq) {
              const FilledBlocks filled = FilledBlocksOf(batch, seq);
              const int64_t last = first + filled.count() * num_heads;
              const int32_t* table =
                  batch.block_tables + int64_t{seq} * batch.max_blocks_per_seq + filled.begin;
              for (int64_t i = std::max(begin, first); i < std::min(end, last); ++i) {
                const int64_t block = table[(i - first) / num_heads];
                GLOAM_CHECK(block >= 0 && block < params.kv.num_blocks);
                BlockSidecars(params, block, static_cast<int>((i - first) % num_heads)).Compute();
              }
              first = last;
            }
          });
}

}  // namespace gloam::cpu
