// What the decode kernel's thread blocks work on: rows, units and what lies in shared memory. Part
// of decode_attention.cu.
#pragma once

#include "kernels/cuda/decode/decode_attention.h"
#include "kernels/cuda/find_range.cuh"
#include "kernels/cuda/shared_barrier.cuh"

namespace gloam::cuda::decode {

constexpr int kBlock = 16;  // tokens of a block of the cache
constexpr int kWarps = 8;
constexpr int kComputeThreads = 32 * kWarps;
constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = 32 * kMergeWarps;
constexpr int kThreads = kComputeThreads + kMergeThreads;
constexpr int kMergeLoads = 16;  // partials that a thread loads at once
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

struct Row {
  int seq;
  int token;
  int context;  // tokens that it may see; -1: not this kernel's
};

__device__ inline Row ReadRow(const DecodeAttentionParams& p, int index) {
  Row row = {.seq = 0, .token = 0, .context = -1};
  if (p.rows == DecodeRows::kEveryToken) {
    row.token = index;
    row.seq = FindRange(p.cu_seqlens, p.num_seqs, index);
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
  int is_last;          // this thread block was the last of a row and group
  SharedBarrier full;   // a phase a unit: its results are here
  SharedBarrier empty;  // a phase a unit: they were read
};

template <int kHeadDim>
struct SharedMemory {
  alignas(128) char rings[kWarps][RingBytes(kComputeCapability)];
  WarpResults<kHeadDim> results;
  int before[kMaxDecodeRows + 1];  // of the rows before: pieces or, shared evenly, blocks
  Row rows[kMaxDecodeRows];
  int warp_sums[kWarps];
  int warp_longest[kWarps];  // blocks of a row
};

template <int kHeadDim>
constexpr int SharedBytes(int compute_capability) {
  using Here = SharedMemory<kHeadDim>;  // as for kComputeCapability
  using Results = WarpResults<kHeadDim>;
  return static_cast<int>(sizeof(Here) - sizeof(Here::rings) - sizeof(Results::out)) +
         kWarps * (RingBytes(compute_capability) +
                   DecodeHeads(compute_capability) * Results::kHeadStride * int{sizeof(float)});
}

// Waits for the other warps that merge.
__device__ __forceinline__ void WaitForMergers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kMergeThreads) : "memory");
}

// Whether a group's thread blocks share the blocks of all contexts evenly, one stretch each,
// instead of all taking turns at pieces that a row's length alone decides. The heads of a KV block
// lie together and are read at about the same time either way, which memory likes.
__device__ __forceinline__ bool SharesEvenly(const DecodeAttentionParams& p, int num_groups) {
  const auto num_blocks = static_cast<int>(gridDim.x);
  const bool divides = num_blocks % num_groups * 8 <= num_blocks;  // few have no stretch
  const int wholes = p.num_rows * num_groups;
  // Almost one for every SM are not cut either: what a cut costs is more than a few SMs bring.
  const bool is_many = wholes > num_blocks || (p.max_splits > 1 && 10 * wholes >= 9 * num_blocks);
  return p.balanced && divides && is_many;
}

// Prepares shared memory: reads the rows and counts their units. Every thread block does it for
// itself: it is hidden behind the kernel before, and needs no order among kernels.
template <int kHeadDim>
__device__ void PlanRows(const DecodeAttentionParams& p, int num_groups,
                         SharedMemory<kHeadDim>& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int i = threadIdx.x;
  if (i == 0) {
    shared.results.full.Init(kComputeThreads);
    shared.results.empty.Init(kMergeThreads);
  }
  Row row = {.seq = 0, .token = 0, .context = -1};
  if (i < p.num_rows) row = ReadRow(p, p.first_row + i);
  const int num_blocks = row.context > 0 ? VisibleBlocks(p, row.context).count : 0;
  int sum = num_blocks;  // or pieces; of this row and those before it
  if (!SharesEvenly(p, num_groups) && num_blocks > 0) sum = DecodeSplits(num_blocks, num_groups);
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += other;
  }
  const int longest = __reduce_max_sync(~0u, num_blocks);
  if (lane == 31 && warp < kWarps) {
    shared.warp_sums[warp] = sum;
    shared.warp_longest[warp] = longest;
  }
  __syncthreads();
  if (i < kMaxDecodeRows) {
    for (int w = 0; w < warp; ++w) sum += shared.warp_sums[w];
    shared.rows[i] = row;
    shared.before[i + 1] = sum;
    if (i == 0) shared.before[0] = 0;
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
  int partial;  // where its result goes, if there are several; those of a row and group are in turn
  int context;
  int first_block;  // of this warp, in the sequence
  int num_blocks;   // of this warp; it takes every kWarps-th
  int next;         // this thread block's next unit
};

// The units of this thread block. `begin` is the first, Unit::next the one after a unit, until
// `end`: they count pieces of all rows and groups or, shared evenly, blocks of all rows.
template <int kHeadDim>
class Units {
 public:
  __device__ __forceinline__ Units(const DecodeAttentionParams& p, int num_groups,
                                   const SharedMemory<kHeadDim>& shared)
      : p_(p),
        num_groups_(num_groups),
        shared_(shared),
        evenly_(SharesEvenly(p, num_groups)),
        total_(shared.before[p.num_rows]),
        sharers_(NumSharers()),
        sharer_(static_cast<int>(blockIdx.x) / num_groups),
        begin_(evenly_ ? StretchOf(sharer_) : blockIdx.x),
        end_(evenly_ ? StretchOf(sharer_ + 1) : total_ * num_groups) {}

  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }

  __device__ Unit Find(int at) const {
    const int per_row = evenly_ ? 1 : num_groups_;
    int low = 0, high = p_.num_rows - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (shared_.before[middle] * per_row <= at) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    Unit unit;
    unit.row = low;
    unit.context = shared_.rows[low].context;
    const BlockRange blocks = VisibleBlocks(p_, unit.context);
    const int first = shared_.before[low] * per_row;
    const int count = shared_.before[low + 1] - shared_.before[low];  // of one group
    const int warp = threadIdx.x / 32;                                // for those that compute
    int first_warp_block;                                             // of the unit
    int begin, end;                                                   // blocks
    if (evenly_) {
      unit.group = static_cast<int>(blockIdx.x) % num_groups_;
      const int first_sharer = SharerOf(first);
      unit.split = sharer_ - first_sharer;
      unit.num_splits = SharerOf(first + count - 1) - first_sharer + 1;
      unit.partial = unit.group * (p_.num_rows + sharers_) + low + sharer_;
      begin = at - first;
      end = min(count, end_ - first);
      unit.next = first + end;
      // Warps take turns across units.
      first_warp_block = (warp - (at - begin_)) & (kWarps - 1);
    } else {
      unit.group = (at - first) / count;
      unit.split = (at - first) % count;
      unit.num_splits = count;
      unit.partial = at;
      // Pieces differ by one block at most.
      begin = blocks.count * unit.split / unit.num_splits;
      end = blocks.count * (unit.split + 1) / unit.num_splits;
      unit.next = at + gridDim.x;
      first_warp_block = warp;
    }
    const int groups_per_kv = num_groups_ / p_.num_kv_heads;
    unit.kv_head = unit.group / groups_per_kv;
    const int first_in_kv = unit.group % groups_per_kv * p_.heads_per_unit;
    unit.first_head = unit.kv_head * p_.heads_per_kv + first_in_kv;
    unit.num_heads = min(p_.heads_per_unit, p_.heads_per_kv - first_in_kv);
    unit.first_block = blocks.begin + begin + first_warp_block;
    unit.num_blocks = max(0, (end - begin - first_warp_block + kWarps - 1) / kWarps);
    return unit;
  }

 private:
  // Those of a group. No row has more pieces than can be merged.
  __device__ __forceinline__ int NumSharers() const {
    int longest = 1;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) longest = max(longest, shared_.warp_longest[w]);
    constexpr int kMostWhole = kMaxDecodeSplits - 2;
    return min(static_cast<int>(gridDim.x) / num_groups_,
               total_ / ((longest + kMostWhole - 1) / kMostWhole));
  }

  // Where a sharer's stretch begins, and which sharer's stretch has a position.
  __device__ __forceinline__ int StretchOf(int sharer) const {
    if (sharers_ == 0) return 0;
    return static_cast<int>(int64_t{total_} * min(sharer, sharers_) / sharers_);
  }
  __device__ __forceinline__ int SharerOf(int at) const {
    return static_cast<int>(((int64_t{at} + 1) * sharers_ - 1) / total_);
  }

  const DecodeAttentionParams& p_;
  const int num_groups_;
  const SharedMemory<kHeadDim>& shared_;
  const bool evenly_;
  const int total_;  // of a group
  const int sharers_;
  const int sharer_;
  const int begin_;
  const int end_;
};

}  // namespace gloam::cuda::decode
