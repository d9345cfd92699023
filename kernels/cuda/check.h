// GLOAM_CUDA_CHECK: every CUDA call goes through it. A failure throws CudaError, which only the
// engine's step loop and MakeCudaOps catch: a context that has failed is never used again.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace gloam::cuda {

class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t error, const char* file, int line, const char* expression);
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
};

}  // namespace gloam::cuda

#define GLOAM_CUDA_CHECK(expression)                                                 \
  do {                                                                               \
    if (const cudaError_t error_ = (expression); error_ != cudaSuccess) [[unlikely]] \
      throw ::gloam::cuda::CudaError(error_, __FILE__, __LINE__, #expression);       \
  } while (false)
