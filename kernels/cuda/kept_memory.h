// Memory that stays in L2 while what is read once streams by, as far as it fits half of what L2 can
// keep. Without, the activations of a layer were written to memory and read again: steps of
// Llama-3.1-8B by 64, 128, 192 and 256 sequences of 1,024 tokens took 8.63, 12.09, 15.45 and 18.78
// ms, so 8.60, 11.90, 15.53 and 18.55, with a prompt's time unchanged (H100, 2026-11-27). More kept
// makes prompts slower: normal accesses lose it.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>

#include "kernels/cuda/check.h"

namespace gloam::cuda {

class KeptMemory {
 public:
  KeptMemory() = default;  // nothing is kept
  KeptMemory(void* data, size_t bytes) {
    int max_window = 0, max_kept = 0;
    GLOAM_CUDA_CHECK(cudaDeviceGetAttribute(&max_window, cudaDevAttrMaxAccessPolicyWindowSize, 0));
    GLOAM_CUDA_CHECK(cudaDeviceGetAttribute(&max_kept, cudaDevAttrMaxPersistingL2CacheSize, 0));
    // Parts of a device (MIG) and shared ones (MPS) may refuse.
    if (cudaDeviceSetLimit(cudaLimitPersistingL2CacheSize, max_kept / 2) != cudaSuccess) {
      cudaGetLastError();
      return;
    }
    window_.base_ptr = data;
    window_.num_bytes = std::min(bytes, static_cast<size_t>(max_window));
    window_.hitRatio = 1.0f;
    window_.hitProp = cudaAccessPropertyPersisting;
    window_.missProp = cudaAccessPropertyNormal;
  }

  // Kernels that are enqueued, or recorded, on `stream` from Open to Close keep it.
  void Open(cudaStream_t stream) const { Set(stream, window_); }
  void Close(cudaStream_t stream) const { Set(stream, {}); }

 private:
  static void Set(cudaStream_t stream, const cudaAccessPolicyWindow& window) {
    cudaStreamAttrValue value = {};
    value.accessPolicyWindow = window;
    GLOAM_CUDA_CHECK(cudaStreamSetAttribute(stream, cudaStreamAttributeAccessPolicyWindow, &value));
  }

  cudaAccessPolicyWindow window_ = {};
};

}  // namespace gloam::cuda
