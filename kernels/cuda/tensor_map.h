// Matrices in global memory as the copy engine of compute capability 9.0 sees them.
#pragma once

#include <cuda.h>

#include <cutlass/cuda_host_adapter.hpp>

#include "base/check.h"

namespace gloam::cuda {

// A tensor of 16-bit elements, innermost dimension (contiguous) first; strides, of the others, in
// elements. Boxes of 128 bytes per row are swizzled in shared memory; what is outside is zero.
template <int kRank>
CUtensorMap MakeTensorMap(const void* data, const int64_t (&shape)[kRank],
                          const int64_t (&strides)[kRank - 1], const int (&box)[kRank]) {
  cuuint64_t sizes[kRank], stride_bytes[kRank - 1];
  cuuint32_t box_sizes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(shape[i]);
    if (i > 0) stride_bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * 2;
    box_sizes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  CUtensorMap map;
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, const_cast<void*>(data), sizes, stride_bytes,
      box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  GLOAM_CHECK(result == CUDA_SUCCESS);
  return map;
}

}  // namespace gloam::cuda
