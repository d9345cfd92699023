#include "kernels/cuda/prefill/widen.h"

#include "base/check.h"
#include "kernels/cuda/e4m3.cuh"
#include "kernels/cuda/find_range.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // of a thread at a time: stores of 16 bytes lie side by side

__device__ __forceinline__ uint2 WidenFour(uint32_t four) {
  return {WidenE4M3(static_cast<uint16_t>(four)), WidenE4M3(static_cast<uint16_t>(four >> 16))};
}

// A thread block per block of the workspace.
__global__ void __launch_bounds__(kThreads) WidenKernel(const __grid_constant__ WidenParams p) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int place = static_cast<int>(blockIdx.x);
  const int seq = FindRange(p.places, p.num_seqs, place);
  const int64_t block = p.block_tables[p.sources[seq] + place - p.places[seq]];
  const auto* from = reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.cache) +
                                                    block * p.block_elements);
  auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + place * p.block_elements);
  const auto count = static_cast<int>(p.block_elements / kElements);
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint2 x = from[i];
    const uint2 low = WidenFour(x.x), high = WidenFour(x.y);
    to[i] = {low.x, low.y, high.x, high.y};
  }
}

}  // namespace

void WidenBlocks(const WidenParams& params) {
  GLOAM_CHECK(params.num_seqs > 0 && params.num_blocks > 0);
  GLOAM_CHECK(params.block_elements % kElements == 0);
  LaunchKernel(WidenKernel, {.grid = dim3(params.num_blocks), .block = dim3(kThreads)},
               params.stream, params);
}

}  // namespace gloam::cuda
