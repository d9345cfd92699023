// What the decode kernel's thread blocks work on: rows, units and what lies in shared memory. Part
// of decode_attention.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/decode_attention.h"

namespace gloam::cuda::decode {

constexpr int kBlock = 16;  // tokens of a block of the cache
constexpr int kWarps = 8;
constexpr int kComputeThreads = 32 * kWarps;
constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = 32 * kMergeWarps;
constexpr int kThreads = kComputeThreads + kMergeThreads;
constexpr int kMergeLoads = 16;  // partials that a thread loads at once
// Units of a thread block, about, where contexts are cut by the batch's work: fewer would leave SMs
// idle at the end, and a unit costs its merging.
constexpr int kBalancedUnits = 8;
static_assert(kMaxDecodeRows <= kComputeThreads, "a thread plans a row");
static_assert(kMaxDecodeSplits % kMergeLoads == 0);

// Bytes of a warp's ring. 12 KB ask an H100 for 64 KB per SM at any time: half is too little, and
// with more, merging waits too long for its own loads.
constexpr int RingBytes(int compute_capability) {
  return HasSmallSharedMemory(compute_capability) ? 8 << 10 : 12 << 10;
}

#ifdef __CUDA_ARCH__
constexpr int kComputeCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kComputeCapability = 80;  // the host asks for the device's own
#endif

// A run is 16 tokens of keys or values of one head, a ring a number of runs.
template <int kHeadDim>
struct Run {
  static constexpr int kRowChunks = kHeadDim / 8;  // of 16 bytes
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kBytes = kBlock * kRowBytes;
  static constexpr int kPerRing = RingBytes(kComputeCapability) / kBytes;
  static_assert(kPerRing >= 2);

  // Where a chunk of a token lies in a run: the same chunk of 8 tokens is in 8 different banks.
  static __device__ __forceinline__ uint32_t Offset(int token, int chunk) {
    return token * kRowBytes + (chunk ^ (token & 7)) * 16;
  }
};
struct Row {
  int seq;
  int token;
  int context;  // tokens that it may see; -1: not this kernel's
};

// The sequence whose tokens include `token`.
__device__ inline int FindSequence(const int32_t* cu_seqlens, int num_seqs, int token) {
  int low = 0, high = num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline Row ReadRow(const DecodeAttentionParams& p, int index) {
  Row row = {.seq = 0, .token = 0, .context = -1};
  if (p.rows == DecodeRows::kEveryToken) {
    row.token = index;
    row.seq = FindSequence(p.cu_seqlens, p.num_seqs, index);
  } else {
    row.seq = index;
    row.token = p.cu_seqlens[index];
  }
  const int later = p.cu_seqlens[row.seq + 1] - 1 - row.token;  // tokens of the sequence after it
  if (p.rows == DecodeRows::kEveryToken || later == 0) {
    row.context = max(0, p.context_lens[row.seq] - later);
  }
  return row;
}

// The blocks that a row with so much context sees.
struct BlockRange {
  int begin;
  int count;
};
__device__ __forceinline__ BlockRange VisibleBlocks(const DecodeAttentionParams& p, int context) {
  const int begin = p.window > 0 ? max(0, context - p.window) / kBlock : 0;
  return {begin, (context + kBlock - 1) / kBlock - begin};
}

// What the warps that compute leave to those that merge.
template <int kHeadDim>
struct WarpResults {
  static constexpr int kHeadStride = kHeadDim + 4;  // spreads heads over the banks

  alignas(16) float out[kWarps][DecodeHeads(kComputeCapability)][kHeadStride];
  float max[kWarps][kMaxDecodeHeads];
  float sum[kWarps][kMaxDecodeHeads];
  float weights[kMaxDecodeHeads][kMaxDecodeSplits];  // of the pieces of a row
  int is_last;  // this thread block was the last of a row and group
};

template <int kHeadDim>
struct SharedMemory {
  alignas(128) char rings[kWarps][Run<kHeadDim>::kPerRing][Run<kHeadDim>::kBytes];
  WarpResults<kHeadDim> results;
  int first_unit[kMaxDecodeRows + 1];  // splits of the rows before
  Row rows[kMaxDecodeRows];
  int warp_sums[kWarps];
};

template <int kHeadDim>
constexpr int SharedBytes(int compute_capability) {
  using Here = SharedMemory<kHeadDim>;  // as for kComputeCapability
  using Results = WarpResults<kHeadDim>;
  return static_cast<int>(sizeof(Here) - sizeof(Here::rings) - sizeof(Results::out)) +
         kWarps * (RingBytes(compute_capability) +
                   DecodeHeads(compute_capability) * Results::kHeadStride * int{sizeof(float)});
}

// Barriers between the warps that compute and those that merge, and among the latter.
enum class Barrier { kFull = 1, kEmpty, kMerge };

// Going on at once, or waiting.
template <Barrier kBarrier>
__device__ __forceinline__ void ArriveAt() {
  asm volatile("bar.arrive %0, %1;" ::"n"(static_cast<int>(kBarrier)), "n"(kThreads) : "memory");
}
template <Barrier kBarrier>
__device__ __forceinline__ void WaitAt() {
  constexpr int kAll = kBarrier == Barrier::kMerge ? kMergeThreads : kThreads;
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kBarrier)), "n"(kAll) : "memory");
}

// Reads the rows and counts their units. Every thread block does it for itself: it is hidden behind
// the kernel before, and needs no order among kernels.
template <int kHeadDim>
__device__ void PlanRows(const DecodeAttentionParams& p, int num_groups,
                         SharedMemory<kHeadDim>& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int i = threadIdx.x;
  Row row = {.seq = 0, .token = 0, .context = -1};
  if (i < p.num_rows) row = ReadRow(p, p.first_row + i);
  const int num_blocks = row.context > 0 ? VisibleBlocks(p, row.context).count : 0;
  int sum = 0;  // splits of this row and those before it
  if (num_blocks > 0) sum = DecodeSplits(num_blocks, num_groups);
  if (p.balanced && p.num_rows * num_groups > static_cast<int>(gridDim.x)) {
    const int in_warp = __reduce_add_sync(~0u, num_blocks);
    if (lane == 0 && warp < kWarps) shared.warp_sums[warp] = in_warp;
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.warp_sums[w];
    const auto piece = static_cast<int>(total * num_groups / (gridDim.x * kBalancedUnits));
    if (num_blocks > 0 && piece > 1) sum = min(sum, max(1, (num_blocks + piece / 2) / piece));
    __syncthreads();
  }
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == 31 && warp < kWarps) shared.warp_sums[warp] = sum;
  __syncthreads();
  if (i < kMaxDecodeRows) {
    for (int w = 0; w < warp; ++w) sum += shared.warp_sums[w];
    shared.rows[i] = row;
    shared.first_unit[i + 1] = sum;
    if (i == 0) shared.first_unit[0] = 0;
  }
  __syncthreads();
}

// One piece of work, as one warp sees it.
struct Unit {
  int row;  // of the launch
  int group;
  int kv_head;
  int first_head;  // query head
  int num_heads;
  int split;
  int num_splits;
  int context;
  int first_block;  // of this warp, in the sequence
  int num_blocks;   // of this warp; it takes every kWarps-th
};

template <int kHeadDim>
__device__ Unit FindUnit(const DecodeAttentionParams& p, int num_groups, int index,
                         const SharedMemory<kHeadDim>& shared) {
  int low = 0, high = p.num_rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (shared.first_unit[middle] * num_groups <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  Unit unit;
  unit.row = low;
  const int first = shared.first_unit[low];
  unit.num_splits = shared.first_unit[low + 1] - first;
  const int in_row = index - first * num_groups;
  unit.group = in_row / unit.num_splits;
  unit.split = in_row % unit.num_splits;
  const int groups_per_kv = num_groups / p.num_kv_heads;
  unit.kv_head = unit.group / groups_per_kv;
  const int first_in_kv = unit.group % groups_per_kv * p.heads_per_unit;
  unit.first_head = unit.kv_head * p.heads_per_kv + first_in_kv;
  unit.num_heads = min(p.heads_per_unit, p.heads_per_kv - first_in_kv);
  unit.context = shared.rows[low].context;
  const BlockRange blocks = VisibleBlocks(p, unit.context);
  // Pieces differ by one block at most.
  const int begin = blocks.count * unit.split / unit.num_splits;
  const int end = blocks.count * (unit.split + 1) / unit.num_splits;
  const int warp = threadIdx.x / 32;  // for those that compute
  unit.first_block = blocks.begin + begin + warp;
  unit.num_blocks = max(0, (end - begin - warp + kWarps - 1) / kWarps);
  return unit;
}

}  // namespace gloam::cuda::decode
