// fp8 (e4m3) elements of the KV cache, read as fp16, which holds each of their values.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace gloam::cuda {

struct E4M3 {
  uint8_t bits;
};

// Two neighbouring elements, the first in the low half of either.
__device__ __forceinline__ uint32_t WidenE4M3(uint16_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t wide;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(pair));
  return wide;
#else
  // With its bits in their places the exponent is 8 too small, in subnormals too. NaN, which is
  // only written for NaN, becomes 480.
  const uint32_t bits = __byte_perm(pair, 0, 0x1404);
  const uint32_t small = (bits & 0x80008000u) | (bits & 0x7f007f00u) >> 1;
  const __half2 wide =
      __hmul2(reinterpret_cast<const __half2&>(small), __half2half2(__ushort_as_half(0x5c00)));
  return reinterpret_cast<const uint32_t&>(wide);
#endif
}

}  // namespace gloam::cuda
