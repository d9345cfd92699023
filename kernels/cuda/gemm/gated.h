// The feed-forward network's first product with its activation (compute capability 9.0 alone). Host
// side of the GEMM backend; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/gemm/plain_product.h"

namespace gloam::cuda {

// y = silu(x w_gate^T) * (x w_up^T), sums in fp32, for many rows of x: a product of which w is
// [2 n, k], the gate's rows, then the up's, and y bf16; no bias, nothing added. n is a multiple of
// kGatedColumns, k of kGatedChannels; rows of x are 16-byte, of y 4-byte aligned.
inline constexpr int kGatedColumns = 128;  // of y in a tile
inline constexpr int kGatedChannels = 64;  // of x at a time
void MultiplyGated(const PlainProduct& product, int num_sms, cudaStream_t stream);

}  // namespace gloam::cuda
