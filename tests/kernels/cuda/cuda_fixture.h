// What tests of the CUDA kernels share: a context, arrays on the GPU, and the rounding of the
// two-byte types. One thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/ops.h"
#include "tests/kernels/cuda/test_sizes.h"

namespace gloam::cuda {

class CudaFixture {
 public:
  explicit CudaFixture(const CudaOptions& options = {}) {
    cudaDeviceProp properties{};
    GLOAM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    context = {.options = options,
               .stream = stream_.get(),
               .num_sms = Sized(properties.multiProcessorCount, 8),
               .compute_capability = 10 * properties.major + properties.minor,
               .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
               .l2_bytes = properties.l2CacheSize};
  }

  void Synchronize() const { GLOAM_CUDA_CHECK(cudaStreamSynchronize(context.stream)); }

  DeviceContext context;

 private:
  Stream stream_;
};

// An array on the GPU. New elements hold 0xFF bytes (NaN as any float): what a kernel does not
// write shows.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size)
      : size_(size), buffer_(AllocateDevice(size * sizeof(T)).value()) {
    GLOAM_CUDA_CHECK(cudaMemset(buffer_.data(), 0xFF, size * sizeof(T)));
    // Streams of contexts do not wait for the default stream.
    GLOAM_CUDA_CHECK(cudaDeviceSynchronize());
  }
  explicit DeviceArray(std::span<const T> values)
      : DeviceArray(static_cast<int64_t>(values.size())) {
    GLOAM_CUDA_CHECK(
        cudaMemcpy(data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice));
    GLOAM_CUDA_CHECK(cudaDeviceSynchronize());  // it returns before the copy is complete
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(std::span<const T>(values)) {}

  T* data() const { return static_cast<T*>(buffer_.data()); }
  int64_t size() const { return size_; }

  // Waits for all of the device's work.
  std::vector<T> Download() const {
    GLOAM_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<T> values(size_);
    GLOAM_CUDA_CHECK(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  int64_t size_;
  Buffer buffer_;
};

// fp32 values rounded to bf16 or fp16, as bits.
inline std::vector<uint16_t> RoundTo(DType dtype, std::span<const float> values) {
  std::vector<uint16_t> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kBF16) {
      const __nv_bfloat16 x = __float2bfloat16(values[i]);
      std::memcpy(&bits[i], &x, sizeof(x));
    } else {
      const __half x = __float2half(values[i]);
      std::memcpy(&bits[i], &x, sizeof(x));
    }
  }
  return bits;
}

inline std::vector<float> ToFloat(DType dtype, std::span<const uint16_t> bits) {
  std::vector<float> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) {
    if (dtype == DType::kBF16) {
      __nv_bfloat16 x;
      std::memcpy(static_cast<void*>(&x), &bits[i], sizeof(x));
      values[i] = __bfloat162float(x);
    } else {
      __half x;
      std::memcpy(static_cast<void*>(&x), &bits[i], sizeof(x));
      values[i] = __half2float(x);
    }
  }
  return values;
}

}  // namespace gloam::cuda
