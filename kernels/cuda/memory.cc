#include <algorithm>
#include <cstring>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device.h"

namespace gloam::cuda {

CudaError::CudaError(cudaError_t error, const char* file, int line, const char* expression)
    : std::runtime_error(fmt::format("CUDA: {} ({}) at {}:{}: {}", cudaGetErrorString(error),
                                     cudaGetErrorName(error), file, line, expression)),
      error_(error) {}

StatusOr<Buffer> AllocateDevice(size_t bytes) {
  void* data = nullptr;
  if (const cudaError_t error = cudaMalloc(&data, std::max<size_t>(bytes, 1));
      error != cudaSuccess) {
    if (error != cudaErrorMemoryAllocation) GLOAM_CUDA_CHECK(error);
    cudaGetLastError();  // this error does not stick: clear it
    size_t free_bytes = 0, total_bytes = 0;
    GLOAM_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    return ResourceExhausted("cannot allocate {} bytes on the GPU: {} of {} are free", bytes,
                             free_bytes, total_bytes);
  }
  Buffer buffer(data, bytes, [](void* memory, size_t) { cudaFree(memory); });
  GLOAM_CUDA_CHECK(cudaMemset(data, 0, std::max<size_t>(bytes, 1)));
  // The backend's stream does not wait for the default stream, which sets the memory.
  GLOAM_CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  return buffer;
}

StatusOr<Buffer> AllocatePinned(size_t bytes) {
  void* data = nullptr;
  if (cudaMallocHost(&data, std::max<size_t>(bytes, 1)) != cudaSuccess) {
    cudaGetLastError();
    return ResourceExhausted("cannot allocate {} bytes of pinned host memory", bytes);
  }
  std::memset(data, 0, bytes);
  return Buffer(data, bytes, [](void* memory, size_t) { cudaFreeHost(memory); });
}

}  // namespace gloam::cuda
