// Attention of single query tokens over the paged KV cache: split along the context, merged on the
// device. Where the batch is not balanced, a row's arithmetic is a pure function of its context
// length and of the shape, so its bits depend neither on the rest of the batch nor on the GPU.
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
  const void* q = nullptr;  // of the cache's type; fp16 over an fp8 cache
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
  int head_dim = 0;        // 64 or 128
  int heads_per_unit = 0;  // at most DecodeHeads() of the GPU, or heads_per_kv

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
  int window = 0;  // tokens that a query sees, itself included; 0: all
  // Where there are about as many rows and groups as SMs or more, a group's SMs share the blocks of
  // all contexts evenly.
  bool balanced = false;
  int max_splits = 0;  // of a row: DecodeSplits of the longest context, or more

  // Scratch; only one launch at a time may use it.
  // [num_rows * DecodeGroups() * max_splits + num_sms][DecodePartialFloats()], device
  float* partials = nullptr;
  int32_t* arrivals = nullptr;  // [num_rows * DecodeGroups()], device; 0 between launches
};

// Query heads that one unit of work serves at most; a KV head with more has several units. Fewer
// where shared memory is small.
inline constexpr int kMaxDecodeHeads = 8;
constexpr bool HasSmallSharedMemory(int compute_capability) {
  return compute_capability == 86 || compute_capability == 89 || compute_capability >= 120;
}
constexpr int DecodeHeads(int compute_capability) {
  return HasSmallSharedMemory(compute_capability) ? kMaxDecodeHeads / 2 : kMaxDecodeHeads;
}

// Groups of heads: units of work of a row, for each split.
constexpr int DecodeGroups(int num_kv_heads, int heads_per_kv, int heads_per_unit) {
  return num_kv_heads * ((heads_per_kv + heads_per_unit - 1) / heads_per_unit);
}

inline constexpr int kMaxDecodeSplits = 64;

// How many pieces a context of so many blocks is cut into, for each group. Four pieces may be as
// short as 16 blocks, more have 32 at least. A row is no more than about 64 units of work: half an
// H100's SMs read at its memory's full speed. Where the pieces are long anyway, it is 128, so that
// no SM is idle.
constexpr int DecodeSplits(int num_blocks, int num_groups) {
  constexpr int kUnits = 64;
  constexpr int kLongPiece = 128;  // blocks
  const auto min = [](int a, int b) { return a < b ? a : b; };
  const auto max = [](int a, int b) { return a > b ? a : b; };
  const int wanted = max(min((num_blocks + 15) / 16, 4), (num_blocks + 31) / 32);
  const int usual = max(1, kUnits / num_groups);
  const bool is_long = num_blocks >= 2 * usual * kLongPiece;
  return min(min(wanted, is_long ? 2 * usual : usual), kMaxDecodeSplits);
}

// A partial result: head by head the unnormalised output, then each head's maximum and sum.
constexpr int DecodePartialFloats(int heads_per_unit, int head_dim) {
  return heads_per_unit * head_dim + 2 * kMaxDecodeHeads;
}

struct DecodeDevice {
  int num_sms = 0;
  int compute_capability = 0;
  cudaStream_t stream = nullptr;
};

// Reads every visible key and value once (per heads_per_unit query heads).
void LaunchDecodeAttention(const DecodeAttentionParams& params, const DecodeDevice& device);

}  // namespace gloam::cuda
