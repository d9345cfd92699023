// The feed-forward network's first product with its activation (compute capability 9.0 alone). Host
// side of the GEMM backend; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gemm/plain_product.h"

namespace gloam::cuda {

// y = silu(x w_gate^T) * (x w_up^T), sums in fp32: products of which w is [2 n, k], the gate's
// rows, then the up's, and y bf16; no bias, nothing added. Rows of x are 16-byte, of y 4-byte
// aligned.

// gated.cu: for many rows; n is a multiple of kGatedColumns, k of kGatedChannels.
inline constexpr int kGatedColumns = 128;  // of y in a tile
inline constexpr int kGatedChannels = 64;  // of x at a time
void MultiplyGated(const PlainProduct& product, int num_sms, cudaStream_t stream);

// batch.cu: for the rows of a decode batch, where y has columns for every SM.
inline constexpr int64_t kMaxGatedBatch = 256;
bool TakesGatedBatch(const PlainProduct& product, int num_sms);
void MultiplyGatedBatch(const PlainProduct& product, int num_sms, cudaStream_t stream);

}  // namespace gloam::cuda
