// The feed-forward network's first product with its activation (compute capability 9.0 alone). Host
// side of the GEMM backend; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gloam::cuda {

// y = silu(x w_gate^T) * (x w_up^T), sums in fp32.
struct GatedProduct {
  const void* x = nullptr;  // [m, k], bf16, 16-byte aligned rows
  int64_t x_stride = 0;
  const void* w = nullptr;  // [2 n, k], bf16, contiguous: the gate's rows, then the up's
  void* y = nullptr;        // [m, n], bf16, 4-byte aligned rows
  int64_t y_stride = 0;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int num_sms = 0;
  cudaStream_t stream = nullptr;
};

// gated_gemm.cu: for many rows; n is a multiple of kGatedColumns, k of kGatedChannels.
inline constexpr int kGatedColumns = 128;  // of y in a tile
inline constexpr int kGatedChannels = 64;  // of x at a time
void MultiplyGated(const GatedProduct& product);

// batch_gemm.cu: for the rows of a decode batch, where y has columns for every SM.
inline constexpr int64_t kMaxGatedBatch = 256;
bool TakesGatedBatch(const GatedProduct& product);
void MultiplyGatedBatch(const GatedProduct& product);

}  // namespace gloam::cuda
