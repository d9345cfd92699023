// y = x W^T of one row of x with GGUF weights: a kernel of its own beside those of params.h.
#pragma once

#include "kernels/cuda/gemm/params.h"

namespace gloam::cuda {

// row_quantized.cu: needs has_clusters. The order of a sum depends on k and the format alone,
// but is not that of StreamGemmQuantized. False: x does not fit, nothing was launched.
bool RowGemmQuantized(WeightType type, const StreamGemmParams& params,
                      const StreamGemmDevice& device);

}  // namespace gloam::cuda
