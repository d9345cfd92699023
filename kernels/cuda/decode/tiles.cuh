// How the decode kernel's warps read keys and values: where a run lies in shared memory, and how
// its elements become tiles of 16-bit ones for mma.m16n8k16, for each type of the cache. Part of
// decode_attention.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/cuda/decode/units.cuh"
#include "kernels/cuda/e4m3.cuh"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda::decode {

// A run is 16 tokens of keys or values of one head, a ring a number of runs.
template <typename T, int kHeadDim>
struct Run {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kLoads = kRowChunks / 2;  // of four matrices: 16 tokens of two chunks
  static constexpr int kBytes = kBlock * kRowBytes;
  static constexpr int kPerRing = RingBytes(kComputeCapability) / kBytes;
  static_assert(kPerRing >= 2);

  // Where a chunk of a token lies in a run: the same chunk of 8 tokens is in 8 different banks.
  static __device__ __forceinline__ uint32_t Offset(int token, int chunk) {
    constexpr int kTokens = kRowBytes < 128 ? 128 / kRowBytes : 1;  // that all banks hold
    return token * kRowBytes + (chunk ^ (token / kTokens & (8 / kTokens - 1))) * 16;
  }
};

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// c += a * b in bf16 or fp16.
template <typename Half>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<Half, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <typename Half>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<Half, __nv_bfloat16>) {
    return PackBf16(low, high);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Tiles of what one load of four matrices brings: kPerLoad of 16 tokens by 16 channels, in the type
// Half. An A operand holds, of lane 4 * g + t, row g in words 0 and 2 and row g + 8 in 1 and 3.
template <typename T>
struct Tiles {
  using Half = T;
  static constexpr int kPerLoad = 1;

  // Rows are tokens. Words 0 and 1 hold channels KeyChannel(t, 0) and the one after it, words 2 and
  // 3 KeyChannel(t, 1) and the one after it.
  static __device__ __forceinline__ int KeyChannel(int t, int j) { return 8 * j + 2 * t; }
  static __device__ __forceinline__ void Keys(const uint32_t (&x)[4], int, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = x[i];
  }

  // Rows are channels: ValueChannel(row). Words hold tokens 2t and 2t + 1 (0, 1), and 8 after (2,
  // 3).
  static __device__ __forceinline__ int ValueChannel(int row) { return row; }
  static __device__ __forceinline__ void Values(const uint32_t (&x)[4], int, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = x[i];
  }
};

// Pairs of bytes are loaded as one 16-bit element, so a chunk has 16 channels.
template <>
struct Tiles<E4M3> {
  using Half = __half;  // holds every e4m3
  static constexpr int kPerLoad = 2;

  // A lane has four neighbouring channels of a token.
  static __device__ __forceinline__ int KeyChannel(int t, int j) { return 4 * t + 2 * j; }
  static __device__ __forceinline__ void Keys(const uint32_t (&x)[4], int tile, uint32_t (&a)[4]) {
    Widen(x[2 * tile], a[0], a[2]);
    Widen(x[2 * tile + 1], a[1], a[3]);
  }

  // A lane has channels 2g and 2g + 1 of tokens 2t and 2t + 1.
  static __device__ __forceinline__ int ValueChannel(int row) { return 2 * (row % 8) + row / 8; }
  static __device__ __forceinline__ void Values(const uint32_t (&x)[4], int tile,
                                                uint32_t (&a)[4]) {
    Widen(__byte_perm(x[tile], 0, 0x3120), a[0], a[1]);
    Widen(__byte_perm(x[tile + 2], 0, 0x3120), a[2], a[3]);
  }

  // Four e4m3 as two pairs of fp16.
  static __device__ __forceinline__ void Widen(uint32_t four, uint32_t& low, uint32_t& high) {
    low = WidenE4M3(static_cast<uint16_t>(four));
    high = WidenE4M3(static_cast<uint16_t>(four >> 16));
  }
};

}  // namespace gloam::cuda::decode
