// What the kernels of matrix products share: asynchronous copies, the tensor cores' instruction,
// the arrangement of rows in shared memory, and what becomes of a sum.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/gemm/params.h"

namespace gloam::cuda {

__device__ __forceinline__ char* SharedPointer(uint32_t address) {
  return static_cast<char*>(__cvta_shared_to_generic(address));
}

// The compiler forgets how `value` was made: else it makes it again at every use.
template <typename T>
__device__ __forceinline__ T Kept(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

// 16 bytes; zeros where `valid` is false, and then `source` is not read.
__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(source) : "memory");
}
// Where `condition` is false, nothing.
__device__ __forceinline__ void CopyAsync16If(bool condition, uint32_t to, const void* source) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(
          to),
      "l"(source), "r"(static_cast<int>(condition))
      : "memory");
}

// All but the latest `pending` groups have arrived.
__device__ __forceinline__ void WaitForCopies(int pending) {
  switch (pending) {
    case 0:
      return WaitForCopies<0>();
    case 1:
      return WaitForCopies<1>();
    case 2:
      return WaitForCopies<2>();
    case 3:
      return WaitForCopies<3>();
    case 4:
      return WaitForCopies<4>();
    case 5:
      return WaitForCopies<5>();
    case 6:
      return WaitForCopies<6>();
    case 7:
      return WaitForCopies<7>();
    case 8:
      return WaitForCopies<8>();
    case 9:
      return WaitForCopies<9>();
    case 10:
      return WaitForCopies<10>();
    default:
      return WaitForCopies<11>();
  }
}
inline constexpr int kMaxStages = 8;

// The streaming product's warps add up their sums in so many parts.
inline constexpr int kSumParts = 4;

// d = c + a b: a is 16 rows of W by 16 columns, b 16 columns by 8 rows of x.
__device__ __forceinline__ void MultiplyAdd(float (&d)[4], const float (&c)[4], uint32_t a0,
                                            uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  MultiplyAdd(c, c, a0, a1, a2, a3, b0, b1);
}

// Rows of x (and of bf16 W) lie in shared memory with the halves of each 128 bytes exchanged in odd
// rows: the 16-byte reads of two rows by eight lanes then use every bank once.
__device__ __forceinline__ int SwizzledChunk(int row, int chunk) { return chunk ^ (row & 1) << 2; }

__device__ __forceinline__ int SegmentOf(const StreamGemmParams& params, int unit) {
  int segment = 0;
  while (segment + 1 < params.num_segments && unit >= params.segments[segment + 1].first_unit) {
    ++segment;
  }
  return segment;
}

// What is left to do with the sum of one element: scale, bias, residual. No fused operations: the
// kernels that share this agree to the last bit.
template <typename Format>
__device__ __forceinline__ void StoreOutput(const StreamGemmParams& params, int unit,
                                            int row_in_unit, int token, float value) {
  const GemmSegment& segment = params.segments[SegmentOf(params, unit)];
  const int row = (unit - segment.first_unit) * kUnitRows + row_in_unit;
  if (row >= segment.rows) return;
  if constexpr (Format::kSumScale != 1) value = __fmul_rn(value, Format::kSumScale);
  if constexpr (Format::kHasRowScales) value = __fmul_rn(value, segment.row_scales[row]);
  if (segment.bias != nullptr) value = __fadd_rn(value, segment.bias[row]);
  const int64_t at = token * segment.y_stride + row;
  if (segment.y_is_bf16) {
    auto* y = static_cast<__nv_bfloat16*>(segment.y) + at;
    *y = __float2bfloat16(segment.accumulate ? __fadd_rn(__bfloat162float(*y), value) : value);
  } else {
    auto* y = static_cast<float*>(segment.y) + at;
    *y = segment.accumulate ? __fadd_rn(*y, value) : value;
  }
}

}  // namespace gloam::cuda
