// FlashInfer's FA2 kernels over the paged cache (compute capability 8.0 and newer): tiles of query
// rows, where the heads of a group count as rows; contexts may be split. Host side: fa2_launch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gloam::cuda {

// A work item is one tile of one planned sequence over one piece of its context; sequences are
// numbered as planned. All arrays are on the device.
struct Fa2Params {
  const void* q = nullptr;  // [num_tokens, num_heads, head_dim] of the cache's type
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  const void* keys = nullptr;    // [num_blocks] of [num_kv_heads, 16, head_dim], a block apart
  const void* values = nullptr;  // likewise
  int num_heads = 0;
  int num_kv_heads = 0;
  int num_seqs = 0;
  int num_works = 0;
  int tile_rows = 0;                      // 64 or 128
  const int32_t* block_tables = nullptr;  // the batch's, flat
  const int32_t* table_begins = nullptr;  // [num_seqs + 1] in block_tables; the last: its size
  const int32_t* q_begins = nullptr;      // [num_seqs] first row of q
  const int32_t* q_lens = nullptr;        // [num_seqs]
  const int32_t* kv_lens = nullptr;       // [num_seqs]
  const int32_t* work_seqs = nullptr;     // [num_works]
  const int32_t* work_tiles = nullptr;    // [num_works]
  const int32_t* work_pieces = nullptr;   // [num_works]
  const int32_t* piece_tokens = nullptr;  // [1]; read if split
  float scale = 0;
  int window_left = -1;  // tokens before its own that a query sees; -1: all
  bool split = false;
  void* out = nullptr;                  // bf16 rows of [num_heads, head_dim]
  const int32_t* out_begins = nullptr;  // [num_seqs] first row of `out`; split: of the pieces
  float* lse = nullptr;                 // [rows of out, num_heads] log2, if split
  int max_shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// One function per cache type and head_dim, in a file each: they take minutes to compile.
void RunFa2Bf16x64(const Fa2Params& params);
void RunFa2Bf16x128(const Fa2Params& params);
void RunFa2F16x64(const Fa2Params& params);
void RunFa2F16x128(const Fa2Params& params);

// merge.cu: adds up the pieces of split rows.
struct MergePiecesParams {
  const void* partial = nullptr;      // bf16 [num pieces of all rows, num_heads, head_dim]
  const float* lse = nullptr;         // [num pieces of all rows, num_heads] log2
  const int32_t* begins = nullptr;    // [num_rows + 1] first piece of each row
  const int32_t* out_rows = nullptr;  // [num_rows]
  int num_rows = 0;
  int num_heads = 0;
  int head_dim = 0;
  void* out = nullptr;  // bf16 [num_tokens, num_heads, head_dim]
  cudaStream_t stream = nullptr;
};
void MergePieces(const MergePiecesParams& params);

}  // namespace gloam::cuda
