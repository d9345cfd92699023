// Row-wise operations between the matrix products. All are bound by memory traffic at many rows and
// by latency at few: each reads and writes its tensors once, in 16-byte pieces where the addresses
// allow it. A row's sums are taken in an order that depends on its length alone.
#include <algorithm>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace {

// ---- RmsNorm: 4 bytes read and 2 or 4 written per element

struct RmsNormKernelParams {
  const float* x;  // [num_rows, heads, dim] with these strides, in elements
  int64_t x_row_stride;
  int64_t x_head_stride;
  const float* weight;  // [dim]
  void* out;            // [num_rows, heads, dim] of Out
  int64_t out_row_stride;
  int64_t out_head_stride;
  int64_t num_vectors;  // num_rows * heads: what is normalised separately
  int heads;
  int dim;
  float eps;
};

struct NormVector {
  const float* x;
  int64_t out_offset;
};

__device__ __forceinline__ NormVector VectorOf(const RmsNormKernelParams& p, int64_t index) {
  const int64_t row = p.heads == 1 ? index : index / p.heads;
  const int64_t head = p.heads == 1 ? 0 : index - row * p.heads;
  return {p.x + row * p.x_row_stride + head * p.x_head_stride,
          row * p.out_row_stride + head * p.out_head_stride};
}

__device__ __forceinline__ float SquareSum(float4 v, float sum) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

__device__ __forceinline__ void Store4(float* to, float4 v) { *reinterpret_cast<float4*>(to) = v; }
__device__ __forceinline__ void Store4(__nv_bfloat16* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = {PackBf16(v.x, v.y), PackBf16(v.z, v.w)};
}
__device__ __forceinline__ void Store1(float* to, float v) { *to = v; }
__device__ __forceinline__ void Store1(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

__device__ __forceinline__ float4 Scaled(float4 x, float scale, float4 weight) {
  return {x.x * scale * weight.x, x.y * scale * weight.y, x.z * scale * weight.z,
          x.w * scale * weight.w};
}

// The sum over a thread block of whole warps, the same in every thread.
__device__ __forceinline__ float BlockSum(float x) {
  __shared__ float sums[32];
  const int num_warps = static_cast<int>(blockDim.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  x = WarpSum(x);
  if (lane == 0) sums[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  return WarpSum(lane < num_warps ? sums[lane] : 0.0f);
}

// A warp per vector of up to 32 * 4 * kPieces elements (heads).
template <int kPieces, typename Out>
__global__ void RmsNormWarpKernel(RmsNormKernelParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int64_t index = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpThreads;
  float4 weight[kPieces], x[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (lane + i * kWarpThreads);
    weight[i] = x[i] = {};
    if (at < p.dim) weight[i] = *reinterpret_cast<const float4*>(p.weight + at);
  }
  AllowNextKernel();
  WaitForEarlierKernels();
  if (index >= p.num_vectors) return;
  const NormVector vector = VectorOf(p, index);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (lane + i * kWarpThreads);
    if (at < p.dim) x[i] = *reinterpret_cast<const float4*>(vector.x + at);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) sum = SquareSum(x[i], sum);
  const float scale = 1.0f / sqrtf(WarpSum(sum) / static_cast<float>(p.dim) + p.eps);
  Out* out = static_cast<Out*>(p.out) + vector.out_offset;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (lane + i * kWarpThreads);
    if (at < p.dim) Store4(out + at, Scaled(x[i], scale, weight[i]));
  }
}

// A thread block per vector, kept in registers: 4 * kPieces elements per thread.
template <int kPieces, typename Out>
__global__ void __launch_bounds__(512) RmsNormBlockKernel(RmsNormKernelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  float4 weight[kPieces], x[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (thread + i * num_threads);
    weight[i] = x[i] = {};
    if (at < p.dim) weight[i] = *reinterpret_cast<const float4*>(p.weight + at);
  }
  AllowNextKernel();
  WaitForEarlierKernels();
  const NormVector vector = VectorOf(p, blockIdx.x);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (thread + i * num_threads);
    if (at < p.dim) x[i] = *reinterpret_cast<const float4*>(vector.x + at);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) sum = SquareSum(x[i], sum);
  const float scale = 1.0f / sqrtf(BlockSum(sum) / static_cast<float>(p.dim) + p.eps);
  Out* out = static_cast<Out*>(p.out) + vector.out_offset;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = 4 * (thread + i * num_threads);
    if (at < p.dim) Store4(out + at, Scaled(x[i], scale, weight[i]));
  }
}

// Any length and alignment: an element at a time, read twice.
template <typename Out>
__global__ void RmsNormAnyKernel(RmsNormKernelParams p) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const NormVector vector = VectorOf(p, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);
  float sum = 0;
  for (int i = thread; i < p.dim; i += num_threads) sum = fmaf(vector.x[i], vector.x[i], sum);
  const float scale = 1.0f / sqrtf(BlockSum(sum) / static_cast<float>(p.dim) + p.eps);
  Out* out = static_cast<Out*>(p.out) + vector.out_offset;
  for (int i = thread; i < p.dim; i += num_threads) {
    Store1(out + i, vector.x[i] * scale * p.weight[i]);
  }
}

constexpr int kWarpNormDim = 256;     // the longest vector that a warp takes
constexpr int kBlockNormDim = 16384;  // ... that 512 threads keep in registers

int RoundUpToWarp(int threads) {
  return (threads + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
}

template <typename Out>
void LaunchRmsNorm(const RmsNormKernelParams& p, cudaStream_t stream) {
  const bool by_four = p.dim % 4 == 0 && p.x_row_stride % 4 == 0 && p.x_head_stride % 4 == 0 &&
                       p.out_row_stride % 4 == 0 && p.out_head_stride % 4 == 0 &&
                       IsAligned16(p.x) && IsAligned16(p.weight) && IsAligned16(p.out);
  const unsigned num_vectors = static_cast<unsigned>(p.num_vectors);
  if (!by_four || p.dim > kBlockNormDim) {
    return LaunchKernel(RmsNormAnyKernel<Out>, {num_vectors, 256}, stream, p);
  }
  if (p.dim <= kWarpNormDim) {
    constexpr unsigned kWarpsPerBlock = 4;
    const dim3 grid((num_vectors + kWarpsPerBlock - 1) / kWarpsPerBlock);
    return LaunchKernel(p.dim <= 128 ? RmsNormWarpKernel<1, Out> : RmsNormWarpKernel<2, Out>,
                        {grid, kWarpsPerBlock * kWarpThreads}, stream, p);
  }
  const int pieces = p.dim <= 4096 ? 2 : p.dim <= 8192 ? 4 : 8;
  const unsigned threads = RoundUpToWarp((p.dim / 4 + pieces - 1) / pieces);
  const auto kernel = pieces == 2   ? RmsNormBlockKernel<2, Out>
                      : pieces == 4 ? RmsNormBlockKernel<4, Out>
                                    : RmsNormBlockKernel<8, Out>;
  LaunchKernel(kernel, {num_vectors, threads}, stream, p);
}

// ---- SiluMul: 4 bytes read and 2 written per element

struct SiluMulKernelParams {
  const __nv_bfloat16* gate;  // [num_tokens, dim], strides in elements
  const __nv_bfloat16* up;
  __nv_bfloat16* out;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t out_stride;
  int dim;
};

__device__ __forceinline__ uint32_t SiluTimesPair(uint32_t gate, uint32_t up) {
  const float2 g = UnpackBf16(gate);
  const float2 u = UnpackBf16(up);
  return PackBf16(SiluTimes(g.x, u.x), SiluTimes(g.y, u.y));
}

// grid: [tokens, pieces of 8 * 256 elements]
__global__ void __launch_bounds__(256) SiluMulKernel(SiluMulKernelParams p) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t token = blockIdx.x;
  const int at = 8 * static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (at >= p.dim) return;
  const uint4 gate = *reinterpret_cast<const uint4*>(p.gate + token * p.gate_stride + at);
  const uint4 up = *reinterpret_cast<const uint4*>(p.up + token * p.up_stride + at);
  *reinterpret_cast<uint4*>(p.out + token * p.out_stride + at) = {
      SiluTimesPair(gate.x, up.x), SiluTimesPair(gate.y, up.y), SiluTimesPair(gate.z, up.z),
      SiluTimesPair(gate.w, up.w)};
}

// Any length and alignment. grid: [tokens, pieces of 256 elements]
__global__ void __launch_bounds__(256) SiluMulAnyKernel(SiluMulKernelParams p) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t token = blockIdx.x;
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (at >= p.dim) return;
  p.out[token * p.out_stride + at] =
      __float2bfloat16_rn(SiluTimes(__bfloat162float(p.gate[token * p.gate_stride + at]),
                                    __bfloat162float(p.up[token * p.up_stride + at])));
}

// ---- GatherRows: each byte read and written once

struct GatherRowsKernelParams {
  const float* x;              // [num_tokens, dim], or what fills as many bytes
  const int32_t* row_indices;  // [num_rows]
  float* out;                  // [num_rows, dim]
  int64_t x_stride;
  int64_t out_stride;
  int64_t num_tokens;
  int dim;
};

// grid: [rows, pieces of 256 T]
template <typename T>
__global__ void __launch_bounds__(256) GatherRowsKernel(GatherRowsKernelParams p) {
  constexpr int kElements = sizeof(T) / sizeof(float);
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const int64_t from = p.row_indices[row];
  const int at = kElements * static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (at >= p.dim || from < 0 || from >= p.num_tokens) return;
  *reinterpret_cast<T*>(p.out + row * p.out_stride + at) =
      *reinterpret_cast<const T*>(p.x + from * p.x_stride + at);
}

unsigned Pieces(int64_t count, int64_t per_piece) {
  return static_cast<unsigned>((count + per_piece - 1) / per_piece);
}

}  // namespace

void RmsNorm(const RmsNormParams& params, const DeviceContext& context) {
  const TensorView& x = params.x;
  const TensorView& out = params.out;
  GLOAM_CHECK(x.rank == 2 || x.rank == 3);
  GLOAM_CHECK(out.rank == x.rank && out.shape == x.shape);
  GLOAM_CHECK(x.dtype == DType::kF32);
  const bool has_heads = x.rank == 3;
  RmsNormKernelParams p = {};
  p.x = x.Data<const float>();
  p.weight = params.weight;
  p.out = out.data;
  p.heads = has_heads ? static_cast<int>(x.shape[1]) : 1;
  p.dim = static_cast<int>(x.shape[x.rank - 1]);
  p.num_vectors = x.shape[0] * p.heads;
  p.x_row_stride = x.strides[0];
  p.x_head_stride = has_heads ? x.strides[1] : 0;
  p.out_row_stride = out.strides[0];
  p.out_head_stride = has_heads ? out.strides[1] : 0;
  p.eps = params.eps;
  GLOAM_CHECK(p.dim > 0);
  if (p.num_vectors == 0) return;
  switch (out.dtype) {
    case DType::kBF16:
      return LaunchRmsNorm<__nv_bfloat16>(p, context.stream);
    case DType::kF32:
      return LaunchRmsNorm<float>(p, context.stream);
    default:
      GLOAM_CHECK(!"RmsNorm writes bf16 or fp32");
  }
}

void SiluMul(const SiluMulParams& params, const DeviceContext& context) {
  const TensorView& gate = params.gate;
  const TensorView& up = params.up;
  const TensorView& out = params.out;
  GLOAM_CHECK(gate.rank == 2 && up.rank == 2 && out.rank == 2);
  GLOAM_CHECK(up.shape == gate.shape && out.shape == gate.shape);
  GLOAM_CHECK(gate.dtype == DType::kBF16 && up.dtype == DType::kBF16 && out.dtype == DType::kBF16);
  SiluMulKernelParams p = {};
  p.gate = static_cast<const __nv_bfloat16*>(gate.data);
  p.up = static_cast<const __nv_bfloat16*>(up.data);
  p.out = static_cast<__nv_bfloat16*>(out.data);
  p.gate_stride = gate.strides[0];
  p.up_stride = up.strides[0];
  p.out_stride = out.strides[0];
  p.dim = static_cast<int>(gate.shape[1]);
  const unsigned num_tokens = static_cast<unsigned>(gate.shape[0]);
  if (num_tokens == 0 || p.dim == 0) return;
  const bool by_eight = p.dim % 8 == 0 && p.gate_stride % 8 == 0 && p.up_stride % 8 == 0 &&
                        p.out_stride % 8 == 0 && IsAligned16(p.gate) && IsAligned16(p.up) &&
                        IsAligned16(p.out);
  if (by_eight) {
    LaunchKernel(SiluMulKernel, {dim3(num_tokens, Pieces(p.dim, 8 * 256)), 256}, context.stream, p);
  } else {
    LaunchKernel(SiluMulAnyKernel, {dim3(num_tokens, Pieces(p.dim, 256)), 256}, context.stream, p);
  }
}

void GatherRows(const GatherRowsParams& params, const DeviceContext& context) {
  const TensorView& x = params.x;
  const TensorView& out = params.out;
  GLOAM_CHECK(x.rank == 2 && out.rank == 2 && out.shape[1] == x.shape[1]);
  GLOAM_CHECK(out.dtype == x.dtype);
  // Rows are copied in words of four bytes.
  const auto words = [&](int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(DTypeBytes(x.dtype));
    GLOAM_CHECK(bytes % 4 == 0);
    return bytes / 4;
  };
  GatherRowsKernelParams p = {};
  p.x = static_cast<const float*>(x.data);
  p.row_indices = params.row_indices;
  p.out = static_cast<float*>(out.data);
  p.x_stride = words(x.strides[0]);
  p.out_stride = words(out.strides[0]);
  p.num_tokens = x.shape[0];
  p.dim = static_cast<int>(words(x.shape[1]));
  const unsigned num_rows = static_cast<unsigned>(out.shape[0]);
  if (num_rows == 0 || p.dim == 0) return;
  const bool by_four = p.dim % 4 == 0 && p.x_stride % 4 == 0 && p.out_stride % 4 == 0 &&
                       IsAligned16(p.x) && IsAligned16(p.out);
  if (by_four) {
    LaunchKernel(GatherRowsKernel<float4>, {dim3(num_rows, Pieces(p.dim, 4 * 256)), 256},
                 context.stream, p);
  } else {
    LaunchKernel(GatherRowsKernel<float>, {dim3(num_rows, Pieces(p.dim, 256)), 256}, context.stream,
                 p);
  }
}

}  // namespace gloam::cuda
