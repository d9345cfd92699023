// Attention of single query tokens over the paged KV cache: split along the context, merged on the
// device. A row's arithmetic is a pure function of its context length and of the shape, so its bits
// depend neither on the rest of the batch nor on the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor_view.h"

namespace gloam::cuda {

// Which query tokens are rows of the batch.
enum class DecodeRows : uint8_t {
  kSingleTokens,  // row i: sequence i, where it has one token; others are left alone
  kEveryToken,    // row i: token i
};

// Rows of one launch: what one thread block plans at once.
inline constexpr int kMaxDecodeRows = 256;

struct DecodeAttentionParams {
  // Query and output, [num_tokens, num_heads, head_dim]; strides in elements.
  const void* q = nullptr;  // of the cache's 16-bit type; bf16 over an fp8 cache
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  void* out = nullptr;  // bf16
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;

  // The layer's cache, [num_blocks][K|V][num_kv_heads][16][head_dim].
  const void* kv = nullptr;
  DType kv_dtype = DType::kBF16;
  int num_kv_heads = 0;
  int heads_per_kv = 0;
  int head_dim = 0;  // 64 or 128

  // The batch. These arrays were complete before the forward pass's first kernel: they are read
  // before waiting for earlier kernels.
  const int32_t* cu_seqlens = nullptr;    // [num_seqs + 1], device
  const int32_t* context_lens = nullptr;  // [num_seqs], device
  const int32_t* block_tables = nullptr;  // [num_seqs, max_blocks_per_seq], device
  int num_seqs = 0;
  int max_blocks_per_seq = 0;
  int first_row = 0;
  int num_rows = 0;  // at most kMaxDecodeRows
  DecodeRows rows = DecodeRows::kSingleTokens;

  float scale = 0;
  int window = 0;      // tokens that a query sees, itself included; 0: all
  int max_splits = 0;  // of a row: DecodeSplits of the longest context, or more

  // Scratch; only one launch at a time may use it.
  float* partials =
      nullptr;  // [num_rows * DecodeGroups() * max_splits][DecodePartialFloats()], device
  int32_t* arrivals = nullptr;  // [num_rows * DecodeGroups()], device; 0 between launches
};

// Query heads that one unit of work serves; a KV head with more has several units.
inline constexpr int kDecodeHeads = 8;

// Groups of heads: units of work of a row, for each split.
constexpr int DecodeGroups(int num_kv_heads, int heads_per_kv) {
  return num_kv_heads * ((heads_per_kv + kDecodeHeads - 1) / kDecodeHeads);
}

// How many pieces a context of so many blocks is cut into, for each group. A piece has at least
// 8 to 16 blocks, more where there are many groups to fill the GPU; a row is never more than about
// 256 units of work (two for each SM of an H100).
constexpr int DecodeSplits(int num_blocks, int num_groups) {
  constexpr int kMaxUnits = 256;
  const int min_blocks = num_groups >= 8 ? 16 : 8;
  const int max_splits =
      num_groups >= kMaxUnits ? 1 : kMaxUnits / (num_groups < 2 ? 2 : num_groups);
  const int wanted = (num_blocks + min_blocks - 1) / min_blocks;
  return wanted < max_splits ? wanted : max_splits;
}

// A partial result: head by head the unnormalised output, then each head's maximum and sum.
constexpr int DecodePartialFloats(int heads_per_kv, int head_dim) {
  return (heads_per_kv < kDecodeHeads ? heads_per_kv : kDecodeHeads) * head_dim + 2 * kDecodeHeads;
}

// Reads every visible key and value once (per kDecodeHeads query heads of a KV head).
void LaunchDecodeAttention(const DecodeAttentionParams& params, int num_sms, cudaStream_t stream);

}  // namespace gloam::cuda
