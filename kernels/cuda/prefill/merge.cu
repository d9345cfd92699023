#include <cuda_bf16.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill/fa2.h"

namespace gloam::cuda {
namespace {

struct MergeParams {
  const __nv_bfloat162* partial;
  const float* lse;
  const int32_t* begins;
  const int32_t* out_rows;
  int num_heads;
  __nv_bfloat162* out;
};

constexpr int kWarpsPerBlock = 4;

// A warp per row and head: reads each piece's output and log-sum once, in ascending order.
template <int kPairsPerLane>
__global__ void MergePiecesKernel(MergeParams params) {
  WaitForEarlierKernels();
  AllowNextKernel();
  const int head = blockIdx.y * kWarpsPerBlock + threadIdx.y;
  if (head >= params.num_heads) return;
  const int begin = params.begins[blockIdx.x];
  const int end = params.begins[blockIdx.x + 1];
  constexpr int kPairsPerHead = 32 * kPairsPerLane;

  float max_lse = -INFINITY;
  float sum = 0;
  float2 total[kPairsPerLane] = {};
  for (int piece = begin; piece < end; ++piece) {
    const int64_t row = static_cast<int64_t>(piece) * params.num_heads + head;
    const float lse = params.lse[row];
    if (lse == -INFINITY) continue;  // nothing of this piece is visible to the row
    const float new_max = fmaxf(max_lse, lse);
    const float old_scale = exp2f(max_lse - new_max);
    const float scale = exp2f(lse - new_max);
    sum = sum * old_scale + scale;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const float2 x =
          __bfloat1622float2(params.partial[row * kPairsPerHead + i * 32 + threadIdx.x]);
      total[i].x = total[i].x * old_scale + x.x * scale;
      total[i].y = total[i].y * old_scale + x.y * scale;
    }
    max_lse = new_max;
  }
  const int64_t out_row =
      static_cast<int64_t>(params.out_rows[blockIdx.x]) * params.num_heads + head;
#pragma unroll
  for (int i = 0; i < kPairsPerLane; ++i) {
    params.out[out_row * kPairsPerHead + i * 32 + threadIdx.x] =
        __floats2bfloat162_rn(total[i].x / sum, total[i].y / sum);
  }
}

}  // namespace

void MergePieces(const MergePiecesParams& params) {
  const MergeParams kernel_params = {
      .partial = static_cast<const __nv_bfloat162*>(params.partial),
      .lse = params.lse,
      .begins = params.begins,
      .out_rows = params.out_rows,
      .num_heads = params.num_heads,
      .out = static_cast<__nv_bfloat162*>(params.out),
  };
  const LaunchShape shape = {
      .grid = dim3(params.num_rows, (params.num_heads + kWarpsPerBlock - 1) / kWarpsPerBlock),
      .block = dim3(32, kWarpsPerBlock)};
  LaunchKernel(params.head_dim == 64 ? MergePiecesKernel<1> : MergePiecesKernel<2>, shape,
               params.stream, kernel_params);
}

}  // namespace gloam::cuda
