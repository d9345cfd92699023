// How a step's input comes to the device: arrays from pinned memory, and tokens that the step
// before drew. A few kilobytes each: latency is all that counts. A kernel copies them: the copy
// engine takes longer, and a recorded step's kernels begin further apart behind one (H100,
// 2026-11-26: 0.5 to 1 us instead of 0.1 to 0.3, a tenth of a step of SmolLM2-135M at batch 64).
//
// Kernels of a step read its arrays (but the tokens) before WaitForEarlierKernels(): nothing in a
// step changes them. So TakeDrawnTokens, the step's first kernel, is not launched by LaunchKernel:
// it starts when the copies have ended, and whatever follows starts after it.
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;
constexpr size_t kMostBytes = size_t{64} << 10;  // by a kernel; more goes by the copy engine

// The host does not change `from` meanwhile, so it is read over the bus while the kernels that may
// still use `to` come to their end.
__global__ void __launch_bounds__(kThreads)
    CopyKernel(const uint32_t* from, uint32_t* to, int num_words) {
  AllowNextKernel();
  uint32_t words[kWordsPerThread];
  const int first = static_cast<int>(blockIdx.x * kThreads * kWordsPerThread + threadIdx.x);
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int at = first + i * kThreads;
    if (at < num_words) words[i] = __ldcv(from + at);
  }
  WaitForEarlierKernels();
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int at = first + i * kThreads;
    if (at < num_words) to[at] = words[i];
  }
}

__global__ void TakeDrawnTokensKernel(int32_t* token_ids, int num_tokens, const int32_t* drawn) {
  AllowNextKernel();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= num_tokens) return;
  const int32_t token = token_ids[i];
  if (token < 0) token_ids[i] = drawn[-1 - token];
}

unsigned NumBlocks(int count, int per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace

void CopyFromPinned(const void* host, void* device, size_t bytes, const DeviceContext& context) {
  if (bytes == 0) return;
  const uintptr_t words = reinterpret_cast<uintptr_t>(host) | reinterpret_cast<uintptr_t>(device) |
                          static_cast<uintptr_t>(bytes);
  if (bytes > kMostBytes || words % sizeof(uint32_t) != 0) {
    GLOAM_CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, context.stream));
    return;
  }
  const auto num_words = static_cast<int>(bytes / sizeof(uint32_t));
  LaunchKernel(CopyKernel, {NumBlocks(num_words, kThreads * kWordsPerThread), kThreads},
               context.stream, static_cast<const uint32_t*>(host), static_cast<uint32_t*>(device),
               num_words);
}

void TakeDrawnTokens(const DrawnTokensParams& params, const int32_t* drawn,
                     const DeviceContext& context) {
  if (params.num_tokens == 0) return;
  TakeDrawnTokensKernel<<<NumBlocks(params.num_tokens, kThreads), kThreads, 0, context.stream>>>(
      params.token_ids, params.num_tokens, drawn);
  GLOAM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gloam::cuda
