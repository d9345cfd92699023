// Products with as many rows as a small decode batch has, bf16 weights (compute capability 9.0
// alone). Host side of the GEMM backend; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/gemm/plain_product.h"

namespace gloam::cuda {

// batch.cu: whether MultiplyBatch takes the product.
bool TakesBatch(const PlainProduct& product, int num_sms);
void MultiplyBatch(const PlainProduct& product, int num_sms, cudaStream_t stream);

}  // namespace gloam::cuda
