// An fp8 cache as fp16, for kernels that read 16-bit keys and values: the blocks that a step's
// sequences see are converted (exactly) to a workspace before every layer's attention.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gloam::cuda {

struct WidenParams {
  const void* cache = nullptr;            // e4m3 [blocks of the cache, block_elements], device
  const int32_t* block_tables = nullptr;  // the batch's, flat, device
  // Blocks places[i] to places[i + 1] of the workspace come from entries sources[i] on.
  const int32_t* places = nullptr;   // [num_seqs + 1], device
  const int32_t* sources = nullptr;  // [num_seqs] in block_tables, device
  int num_seqs = 0;
  int num_blocks = 0;  // places[num_seqs]
  int64_t block_elements = 0;
  void* out = nullptr;  // fp16 [num_blocks, block_elements], device
  cudaStream_t stream = nullptr;
};
// Reads 1 byte and writes 2 per element.
void WidenBlocks(const WidenParams& params);

}  // namespace gloam::cuda
