// 16-byte loads and stores, conversions to the 16-bit types, reductions of a warp and the
// activation function, for the kernels of this folder that work on rows.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace gloam::cuda {

inline constexpr int kWarpThreads = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// An 8 x 8 matrix of 16-bit elements, two of row lane / 4 in each lane, transposed.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// The two bf16 of a word.
__device__ __forceinline__ float2 UnpackBf16(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

// silu(gate) * up. __fdividef gives 0 for a divisor past 2^126, and exp(-gate) reaches that below
// -87: the limit of silu there is 0 to the precision of bf16's normal numbers as well.
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

inline bool IsAligned16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace gloam::cuda
