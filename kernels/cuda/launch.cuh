// Launching kernels with programmatic dependent launch: a kernel may start while the one before it
// in the stream still drains. Every kernel of this folder that is launched with LaunchKernel calls
// WaitForEarlierKernels() before it reads what an earlier kernel wrote or writes what one reads,
// and may do work of its own before (load weights, set up); calling AllowNextKernel() early lets
// the next kernel do the same. Both are nothing before compute capability 9.0.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/check.h"

namespace gloam::cuda {

__device__ __forceinline__ void WaitForEarlierKernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void AllowNextKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic; above 48 KiB the caller has raised the kernel's limit
  int cluster_blocks = 1;   // along x; more than one from compute capability 9.0 on
};

// Lets kKernel have up to `bytes` of dynamic shared memory; done once (one GPU), so `bytes` is the
// same every time.
template <auto kKernel>
void AllowSharedBytes(int bytes) {
  static const bool allowed = [&] {
    GLOAM_CUDA_CHECK(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return true;
  }();
  static_cast<void>(allowed);
}

template <typename... Params, typename... Args>
void LaunchKernel(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                  Args&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster_blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster_blocks > 1 ? 2 : 1;
  GLOAM_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...));
}

}  // namespace gloam::cuda
