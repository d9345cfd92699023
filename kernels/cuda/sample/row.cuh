// What sampling's kernels share: logits as ordered integers, weights, reading the chunks of a row,
// and reductions of a thread block.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/sample/kernels.h"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {

inline constexpr int kRowThreads = 1024;  // of a thread block that handles a row alone

// ---- logits as ordered integers

inline constexpr uint32_t kMinusInfinityKey = 0x007fffff;

// NaN counts as -infinity, +infinity as the largest finite number, and -0 as +0.
__device__ __forceinline__ float Clean(float x) {
  return isnan(x) ? -INFINITY : __fadd_rn(fminf(x, FLT_MAX), 0.0f);
}

// Larger logit, larger key.
__device__ __forceinline__ uint32_t KeyOf(float clean) {
  const uint32_t bits = __float_as_uint(clean);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float LogitOf(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Probability relative to the most likely token's.
struct Weigher {
  float max;
  float inverse_temperature;

  __device__ __forceinline__ float Weight(float logit) const {
    if (logit == -INFINITY) return 0;
    return expf(__fmul_rn(__fsub_rn(logit, max), inverse_temperature));
  }
  __device__ __forceinline__ uint64_t Mass(float logit) const {
    return __float2ull_rn(Weight(logit) * 0x1p44f);
  }
};

// ---- reading a row

struct Row {
  const float* logits;        // [vocab_size]
  const uint32_t* mask;       // or null
  const uint32_t* chunk_max;  // [num_chunks]
  uint64_t* chunk_mass;       // [num_chunks]
  int vocab_size;
  int num_chunks;
  bool by_four;
};

__device__ __forceinline__ Row RowOf(const SampleArgs& args, int64_t row, int64_t mask) {
  return {args.logits + row * args.row_stride,
          mask >= 0 ? args.masks + mask : nullptr,
          args.chunk_max + row * args.num_chunks,
          args.chunk_mass + row * args.num_chunks,
          args.vocab_size,
          args.num_chunks,
          args.by_four};
}

struct Four {
  float x[4];
};

// Clean logits of tokens at .. at + 3; -infinity for those past the end or not allowed.
__device__ __forceinline__ Four LoadFour(const Row& row, int at) {
  Four four = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
  if (at >= row.vocab_size) return four;
  if (row.by_four && at + 4 <= row.vocab_size) {
    const float4 v = *reinterpret_cast<const float4*>(row.logits + at);
    four = {{Clean(v.x), Clean(v.y), Clean(v.z), Clean(v.w)}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < row.vocab_size) four.x[i] = Clean(row.logits[at + i]);
    }
  }
  if (row.mask != nullptr) {
    const uint32_t allowed = row.mask[at / 32] >> (at % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((allowed >> i & 1) == 0) four.x[i] = -INFINITY;
    }
  }
  return four;
}

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ __forceinline__ int Warp() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
__device__ __forceinline__ int NumWarps() { return static_cast<int>(blockDim.x) / kWarpThreads; }

__device__ __forceinline__ uint64_t WarpSum64(uint64_t x) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// Calls f(chunk, four) for the chunks [begin, end) whose maximum is at least `lowest_key`, a warp
// per chunk, several chunks' loads at a time.
template <typename F>
__device__ __forceinline__ void ForChunks(const Row& row, int begin, int end, uint32_t lowest_key,
                                          const F& f) {
  constexpr int kAtOnce = 4;
  const int num_warps = NumWarps();
  for (int base = begin + Warp(); base < end; base += num_warps * kWarpThreads) {
    const int mine = base + Lane() * num_warps;
    const bool wanted = mine < end && (lowest_key == 0 || row.chunk_max[mine] >= lowest_key);
    unsigned left = __ballot_sync(kAllLanes, wanted);
    while (left != 0) {
      int chunks[kAtOnce];
      Four fours[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        chunks[i] = left == 0 ? -1 : base + (__ffs(static_cast<int>(left)) - 1) * num_warps;
        left &= left - 1;
        if (chunks[i] >= 0) fours[i] = LoadFour(row, chunks[i] * kSampleChunk + 4 * Lane());
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (chunks[i] >= 0) f(chunks[i], fours[i]);
      }
    }
  }
}

// Calls f(key, logit, token) for every token whose key is at least `lowest_key`.
template <typename F>
__device__ __forceinline__ void ForTokens(const Row& row, uint32_t lowest_key, const F& f) {
  ForChunks(row, 0, row.num_chunks, lowest_key, [&](int chunk, const Four& four) {
    const int at = chunk * kSampleChunk + 4 * Lane();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = KeyOf(four.x[i]);
      if (at + i < row.vocab_size && key >= lowest_key) f(key, four.x[i], at + i);
    }
  });
}

// ---- reductions of a thread block; all threads take part and get the result

struct BlockMemory {
  uint64_t sums[kWarpThreads];
};

__device__ __forceinline__ uint64_t BlockSum64(BlockMemory& memory, uint64_t x) {
  x = WarpSum64(x);
  __syncthreads();
  if (Lane() == 0) memory.sums[Warp()] = x;
  __syncthreads();
  return WarpSum64(Lane() < NumWarps() ? memory.sums[Lane()] : 0);
}

// Sum over the threads before this one; `total` becomes the sum over all.
__device__ __forceinline__ uint64_t BlockScan64(BlockMemory& memory, uint64_t x, uint64_t& total) {
  const auto warp_inclusive = [](uint64_t value) {
#pragma unroll
    for (int offset = 1; offset < kWarpThreads; offset *= 2) {
      const uint64_t before = __shfl_up_sync(kAllLanes, value, offset);
      if (Lane() >= offset) value += before;
    }
    return value;
  };
  const uint64_t inclusive = warp_inclusive(x);
  __syncthreads();
  if (Lane() == kWarpThreads - 1) memory.sums[Warp()] = inclusive;
  __syncthreads();
  const uint64_t warps = warp_inclusive(Lane() < NumWarps() ? memory.sums[Lane()] : 0);
  total = __shfl_sync(kAllLanes, warps, kWarpThreads - 1);
  const uint64_t before_warp = __shfl_sync(kAllLanes, warps, Warp() - 1 + (Warp() == 0));
  return inclusive - x + (Warp() == 0 ? 0 : before_warp);
}

__device__ __forceinline__ uint32_t BlockMax(BlockMemory& memory, uint32_t x) {
  x = __reduce_max_sync(kAllLanes, x);
  __syncthreads();
  if (Lane() == 0) memory.sums[Warp()] = x;
  __syncthreads();
  return __reduce_max_sync(kAllLanes,
                           Lane() < NumWarps() ? static_cast<uint32_t>(memory.sums[Lane()]) : 0);
}

// The key of the row's largest logit.
__device__ __forceinline__ uint32_t RowMaxKey(BlockMemory& memory, const Row& row) {
  uint32_t max = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += blockDim.x) {
    max = umax(max, row.chunk_max[i]);
  }
  return BlockMax(memory, max);
}

}  // namespace gloam::cuda
