// Views of the paged KV cache. Blocks of 16 tokens; per layer one array laid out
// [block][K|V][kv_head][16][head_dim], so that one block of one head is one contiguous run.
// The memory belongs to the engine's KvCachePool; which block holds what, to its BlockManager.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor_view.h"

namespace gloam {

inline constexpr int kBlockTokens = 16;

// What a cache may hold.
constexpr bool IsKvDType(DType dtype, Device device) {
  return dtype == DType::kBF16 || dtype == DType::kF16 ||
         dtype == (device == Device::kCpu ? DType::kF32 : DType::kF8E4M3);
}

// The shape of one layer's cache.
struct KvLayout {
  DType dtype = DType::kBF16;
  int num_kv_heads = 0;
  int head_dim = 0;

  int64_t head_run_elements() const { return int64_t{kBlockTokens} * head_dim; }
  int64_t block_elements() const { return 2 * num_kv_heads * head_run_elements(); }
  int64_t block_bytes() const { return block_elements() * static_cast<int64_t>(DTypeBytes(dtype)); }
};

// One layer of the cache.
struct KvLayerView {
  void* data = nullptr;  // [num_blocks][K|V][num_kv_heads][16][head_dim] of layout.dtype
  KvLayout layout;
  int64_t num_blocks = 0;

  // The run of 16 x head_dim keys (values) of one head of one block.
  template <typename T>
  T* Keys(int64_t block, int kv_head) const {
    return static_cast<T*>(data) + block * layout.block_elements() +
           kv_head * layout.head_run_elements();
  }
  template <typename T>
  T* Values(int64_t block, int kv_head) const {
    return Keys<T>(block, kv_head) + layout.num_kv_heads * layout.head_run_elements();
  }
};

// Which tokens a step works on and where their keys and values live. All arrays are on the
// backend's device and valid during the step, but those named host_; no operation of the step
// writes them, so that kernels may read them before earlier ones are done. Sequences are packed one
// after another. A recorded step (Ops::Repeat) may be padded with sequences of one token and a
// context of 0; nothing is computed for them.
struct SequenceBatch {
  int num_seqs = 0;
  int num_tokens = 0;  // cu_seqlens[num_seqs]
  int max_blocks_per_seq = 0;
  const int32_t* positions = nullptr;     // [num_tokens] position of each token in its sequence
  const int64_t* slot_mapping = nullptr;  // [num_tokens] block * 16 + offset where its K/V go
  const int32_t* cu_seqlens = nullptr;    // [num_seqs + 1] first token of each sequence
  const int32_t* context_lens = nullptr;  // [num_seqs] tokens in the cache including this step's
  const int32_t* block_tables = nullptr;  // [num_seqs, max_blocks_per_seq] block ids
  // The same arrays where the host reads them.
  const int32_t* host_cu_seqlens = nullptr;
  const int32_t* host_context_lens = nullptr;

  // Every sequence has one token: nothing but decoding.
  bool decode_only() const { return num_tokens == num_seqs; }
};

}  // namespace gloam
