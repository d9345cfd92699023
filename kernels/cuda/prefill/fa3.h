// FlashInfer's FA3 kernels over the paged cache (compute capability 9.0 alone): a persistent thread
// block per multiprocessor works off its list of query tiles. Host side: fa3_launch.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gloam::cuda {

// A work item is one tile of one head of one sequence. All arrays are on the device.
struct Fa3Params {
  const void* q = nullptr;  // [num_tokens, num_heads, head_dim] of the cache's type
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  int64_t num_tokens = 0;
  const void* cache = nullptr;  // [num_blocks][K|V][num_kv_heads][16][head_dim]
  int64_t num_blocks = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  const int32_t* block_tables = nullptr;       // the batch's, flat
  const int32_t* work_begins = nullptr;        // [num_thread_blocks + 1] first item of each
  const int32_t* work_heads = nullptr;         // [works]
  const int32_t* work_tiles = nullptr;         // [works]
  const int32_t* work_q_begins = nullptr;      // [works] first row of q and out
  const int32_t* work_table_begins = nullptr;  // [works] in block_tables
  const int32_t* work_q_lens = nullptr;        // [works]
  const int32_t* work_kv_lens = nullptr;       // [works]
  float scale = 0;
  int window_left = -1;  // tokens before its own that a query sees; -1: all
  void* out = nullptr;   // bf16 [num_tokens, num_heads, head_dim]
  int num_thread_blocks = 0;
  cudaStream_t stream = nullptr;
};

// One function per cache type and head_dim, in a file each: they take minutes to compile.
void RunFa3Bf16x64(const Fa3Params& params);
void RunFa3Bf16x128(const Fa3Params& params);
void RunFa3F16x64(const Fa3Params& params);
void RunFa3F16x128(const Fa3Params& params);

}  // namespace gloam::cuda
