// One query token of each row against its context.
//
// A unit of work is a row, a group of up to 8 query heads that share a KV head, and a piece of the
// context. Thread blocks are persistent and stride over the units. Each warp takes every eighth
// block of 16 tokens of the piece and keeps a softmax of its own; the warps' results are merged
// through shared memory, the pieces' through global memory by the thread block that finishes last,
// both in ascending order.
//
// Both products use mma.m16n8k16 with tokens (channels) as its 16 rows and query heads as its 8
// columns, S^T = K Q^T and O^T = V^T P^T, and take keys and values from global memory straight into
// fragments, 16 bytes per load: a fragment's place in the dot product does not matter as long as
// both operands agree, so channels are numbered as they come. Of lane = 4 * g + t:
//   K: chunks (8 channels) t, t + 4, ... of tokens g and g + 8; Q the same of head g.
//   V: chunks g (and g + 8) of tokens 2t, 2t + 1, 2t + 8, 2t + 9; tokens are paired by prmt.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace {

constexpr int kBlock = 16;  // tokens of a block of the cache
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxSplits = 128;
static_assert(kThreads == kMaxDecodeRows, "a thread plans a row");
static_assert(kWarps == kDecodeHeads, "a warp weighs a head's partials");

constexpr int CtasPerSm(int head_dim) { return head_dim == 64 ? 3 : 2; }

__device__ __forceinline__ uint4 LoadStreaming(const void* address) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

// Loaded where it is written: what would be kept in registers for a whole unit is cheaper to load
// for every block.
__device__ __forceinline__ uint4 LoadAgain(const uint4* shared) {
  uint4 x;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))));
  return x;
}

// Counts this thread block in, after what it wrote (before a barrier of the block) and before what
// it reads of others. Returns the count before.
__device__ __forceinline__ int32_t Arrive(int32_t* count) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
}

// The arithmetic of one 16-bit type.
template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static __device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Half<__half> {
  static __device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// An 8 x 8 matrix of 16-bit elements, two of row lane / 4 in each lane, transposed.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Over the lanes that differ in g.
__device__ __forceinline__ float MaxOverTokens(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}
__device__ __forceinline__ float SumOverTokens(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

struct Row {
  int seq;
  int token;
  int context;  // tokens that it may see; -1: not this kernel's
};

// The sequence whose tokens include `token`.
__device__ int FindSequence(const int32_t* cu_seqlens, int num_seqs, int token) {
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

__device__ Row ReadRow(const DecodeAttentionParams& p, int index) {
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
struct SharedMemory {
  static constexpr int kHeadStride = kHeadDim + 8;  // spreads heads over the banks

  int first_unit[kMaxDecodeRows + 1];  // splits of the rows before
  Row rows[kMaxDecodeRows];
  Unit units[2][kWarps];              // at work and next, as each warp sees them
  uint4 query[2][kHeadDim / 32][32];  // of the unit at work and the next: fragments of each lane
  int warp_sums[kWarps];
  int is_last;
  float max[kWarps][kDecodeHeads];
  float sum[kWarps][kDecodeHeads];
  union alignas(16) {
    float out[kWarps][kDecodeHeads][kHeadStride];  // [channel] of each warp and head
    float weights[kDecodeHeads][kMaxSplits];       // of the pieces of a row
  };
};

// Reads the rows and counts their units. Every thread block does it for itself: it is hidden behind
// the kernel before, and needs no order among kernels.
template <int kHeadDim>
__device__ void PlanRows(const DecodeAttentionParams& p, int num_groups,
                         SharedMemory<kHeadDim>& shared) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int splits = 0;
  Row row = {.seq = 0, .token = 0, .context = -1};
  if (threadIdx.x < p.num_rows) row = ReadRow(p, p.first_row + threadIdx.x);
  if (row.context > 0) splits = DecodeSplits(VisibleBlocks(p, row.context).count, num_groups);
  int sum = splits;  // of this thread and those before it
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == 31) shared.warp_sums[warp] = sum;
  shared.rows[threadIdx.x] = row;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += shared.warp_sums[w];
  shared.first_unit[threadIdx.x + 1] = sum;
  if (threadIdx.x == 0) shared.first_unit[0] = 0;
  __syncthreads();
}

template <int kHeadDim>
__device__ __forceinline__ Unit FindUnit(const DecodeAttentionParams& p, int num_groups, int index,
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
  const int first_in_kv = unit.group % groups_per_kv * kDecodeHeads;
  unit.first_head = unit.kv_head * p.heads_per_kv + first_in_kv;
  unit.num_heads = min(kDecodeHeads, p.heads_per_kv - first_in_kv);
  unit.context = shared.rows[low].context;
  const BlockRange blocks = VisibleBlocks(p, unit.context);
  // Pieces differ by one block at most.
  const int begin = static_cast<int>(int64_t{blocks.count} * unit.split / unit.num_splits);
  const int end = static_cast<int>(int64_t{blocks.count} * (unit.split + 1) / unit.num_splits);
  const int warp = threadIdx.x / 32;
  unit.first_block = blocks.begin + begin + warp;
  unit.num_blocks = max(0, (end - begin - warp + kWarps - 1) / kWarps);
  return unit;
}

// A block's keys and values of one head in a warp's registers.
template <typename T, int kHeadDim>
struct Fragments {
  static constexpr int kChunks = kHeadDim / 8;  // 16 bytes each
  static constexpr int kKeyLoads = kChunks / 4;
  static constexpr int kValueLoads = kChunks / 8;

  uint4 keys[kKeyLoads][2];      // of tokens g, g + 8
  uint4 values[kValueLoads][4];  // of tokens 2t, 2t + 1, 2t + 8, 2t + 9

  __device__ __forceinline__ void LoadKeys(const T* run, int g, int t) {
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        keys[i][j] = LoadStreaming(run + (g + 8 * j) * kHeadDim + (t + 4 * i) * 8);
      }
    }
  }
  __device__ __forceinline__ void LoadValues(const T* run, int g, int t) {
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = 2 * t + j % 2 + j / 2 * 8;
        values[i][j] = LoadStreaming(run + token * kHeadDim + (g + 8 * i) * 8);
      }
    }
  }
};

__device__ __forceinline__ uint32_t Word(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// A warp's softmax so far, of heads 2t and 2t + 1.
template <typename T, int kHeadDim>
struct Accumulator {
  static constexpr int kTiles = kHeadDim / 16;

  float out[kTiles][4];  // channels of rows g (0, 1) and g + 8 (2, 3), heads 2t and 2t + 1
  float max[2];
  float sum[2];  // of the tokens of this lane

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0;
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Scores of tokens g (0, 1) and g + 8 (2, 3). `query`: the lane's fragments, 32 apart.
  static __device__ __forceinline__ void Scores(const Fragments<T, kHeadDim>& block,
                                                const uint4* query, float (&s)[4]) {
    s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      const uint4 q = LoadAgain(query + 32 * i);
      const uint4 a = block.keys[i][0];
      const uint4 b = block.keys[i][1];
      Half<T>::Mma(s, a.x, b.x, a.y, b.y, q.x, q.y);
      Half<T>::Mma(s, a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }

  // Takes the scores in; `p` is what the values are multiplied by. scale_log2: of the scores.
  __device__ __forceinline__ void Softmax(const float (&s)[4], float scale_log2, uint32_t (&p)[2]) {
    float prob[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float new_max = fmaxf(max[h], MaxOverTokens(fmaxf(s[h], s[h + 2])));
      const float offset = new_max * scale_log2;
      const float shrink = exp2f(max[h] * scale_log2 - offset);
      max[h] = new_max;
      prob[h] = exp2f(s[h] * scale_log2 - offset);
      prob[h + 2] = exp2f(s[h + 2] * scale_log2 - offset);
      sum[h] = sum[h] * shrink + (prob[h] + prob[h + 2]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        out[i][h] *= shrink;
        out[i][h + 2] *= shrink;
      }
    }
    p[0] = Transpose8x8(Half<T>::Pack(prob[0], prob[1]));
    p[1] = Transpose8x8(Half<T>::Pack(prob[2], prob[3]));
  }

  // Adds the values times `p`. Tile i has channel i of every chunk; where there are 8 chunks, its
  // rows from 8 on have channel i + 4.
  __device__ __forceinline__ void AddValues(const Fragments<T, kHeadDim>& block,
                                            const uint32_t (&p)[2]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      constexpr int kUpper = kHeadDim == 128 ? 1 : 0;
      const int upper = kHeadDim == 128 ? i : i + 4;
      uint32_t a[4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        a[2 * pair] = Pair(block.values[0][2 * pair], block.values[0][2 * pair + 1], i);
        a[2 * pair + 1] =
            Pair(block.values[kUpper][2 * pair], block.values[kUpper][2 * pair + 1], upper);
      }
      Half<T>::Mma(out[i], a[0], a[1], a[2], a[3], p[0], p[1]);
    }
  }

  // Channel `i` of two tokens' chunks.
  static __device__ __forceinline__ uint32_t Pair(const uint4& first, const uint4& second, int i) {
    return __byte_perm(Word(first, i / 2), Word(second, i / 2), i % 2 == 0 ? 0x5410 : 0x7632);
  }
};

// Takes out the tokens of a block that the row does not see: those from `end` on, and those before
// `begin` (both within the block). What lies there may be anything, NaN too.
template <typename T, int kHeadDim>
__device__ __forceinline__ void MaskTokens(int begin, int end, int g, int t,
                                           Fragments<T, kHeadDim>& block, float (&s)[4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (g + 8 * j < begin || g + 8 * j >= end) s[2 * j] = s[2 * j + 1] = -INFINITY;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int token = 2 * t + j % 2 + j / 2 * 8;
    if (token >= begin && token < end) continue;
#pragma unroll
    for (int i = 0; i < Fragments<T, kHeadDim>::kValueLoads; ++i) {
      block.values[i][j] = make_uint4(0, 0, 0, 0);
    }
  }
}

// Leaves a warp's result in shared memory.
template <typename T, int kHeadDim>
__device__ __forceinline__ void StoreWarp(Accumulator<T, kHeadDim>& acc, float scale_log2,
                                          int num_heads, SharedMemory<kHeadDim>& shared) {
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = SumOverTokens(acc.sum[h]);
    const int head = 2 * t + h;
    if (head >= num_heads) continue;
    if (g == 0) {
      shared.max[warp][head] = acc.max[h] * scale_log2;
      shared.sum[warp][head] = sum;
    }
    float* out = shared.out[warp][head];
    if constexpr (kHeadDim == 128) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(out + g * 8 + i) =
            make_float4(acc.out[i][h], acc.out[i + 1][h], acc.out[i + 2][h], acc.out[i + 3][h]);
        *reinterpret_cast<float4*>(out + (g + 8) * 8 + i) = make_float4(
            acc.out[i][h + 2], acc.out[i + 1][h + 2], acc.out[i + 2][h + 2], acc.out[i + 3][h + 2]);
      }
    } else {
      *reinterpret_cast<float4*>(out + g * 8) =
          make_float4(acc.out[0][h], acc.out[1][h], acc.out[2][h], acc.out[3][h]);
      *reinterpret_cast<float4*>(out + g * 8 + 4) =
          make_float4(acc.out[0][h + 2], acc.out[1][h + 2], acc.out[2][h + 2], acc.out[3][h + 2]);
    }
  }
}

__device__ __forceinline__ __nv_bfloat16* OutRow(const DecodeAttentionParams& p, int token,
                                                 int head) {
  return static_cast<__nv_bfloat16*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
}

// Merges the warps' results into the row's output, or, where it has several pieces, into a partial.
template <int kHeadDim>
__device__ __forceinline__ void MergeWarps(const DecodeAttentionParams& p, const Unit& unit,
                                           int token, float* partial,
                                           const SharedMemory<kHeadDim>& shared) {
  const int stored_heads = min(kDecodeHeads, p.heads_per_kv);
  for (int i = threadIdx.x; i < unit.num_heads * (kHeadDim / 2); i += kThreads) {
    const int head = i / (kHeadDim / 2);
    const int channel = i % (kHeadDim / 2) * 2;
    float max = shared.max[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) max = fmaxf(max, shared.max[w][head]);
    float2 out = {0, 0};
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(shared.max[w][head] - max);
      const float2 x = *reinterpret_cast<const float2*>(&shared.out[w][head][channel]);
      out.x += weight * x.x;
      out.y += weight * x.y;
      sum += weight * shared.sum[w][head];
    }
    if (unit.num_splits == 1) {
      const float scale = 1 / sum;
      *reinterpret_cast<__nv_bfloat162*>(OutRow(p, token, unit.first_head + head) + channel) =
          __floats2bfloat162_rn(out.x * scale, out.y * scale);
    } else {
      __stcg(reinterpret_cast<float2*>(partial + head * kHeadDim + channel), out);
      if (channel == 0) {
        __stcg(partial + stored_heads * kHeadDim + 2 * head, max);
        __stcg(partial + stored_heads * kHeadDim + 2 * head + 1, sum);
      }
    }
  }
}

// Merges the pieces' partials of a row and group; `first` is that of the first piece.
template <int kHeadDim>
__device__ void MergeSplits(const DecodeAttentionParams& p, const Unit& unit, int token,
                            const float* first, SharedMemory<kHeadDim>& shared) {
  const int stored_heads = min(kDecodeHeads, p.heads_per_kv);
  const int stride = DecodePartialFloats(p.heads_per_kv, kHeadDim);
  const int lane = threadIdx.x % 32;
  if (const int head = threadIdx.x / 32; head < unit.num_heads) {
    float2 stats[kMaxSplits / 32];  // maximum and sum of pieces lane, lane + 32, ...
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int s = lane + 32 * i;
      stats[i] = {-INFINITY, 0};
      if (s < unit.num_splits) {
        stats[i] = __ldcg(reinterpret_cast<const float2*>(first + int64_t{s} * stride +
                                                          stored_heads * kHeadDim + 2 * head));
      }
      max = fmaxf(max, stats[i].x);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, mask));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      stats[i].x = exp2f(stats[i].x - max);
      sum += stats[i].x * stats[i].y;
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      shared.weights[head][lane + 32 * i] = stats[i].x / sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < unit.num_heads * (kHeadDim / 2); i += kThreads) {
    const int head = i / (kHeadDim / 2);
    const int channel = i % (kHeadDim / 2) * 2;
    const float* x = first + head * kHeadDim + channel;
    float2 out = {0, 0};
#pragma unroll 16
    for (int s = 0; s < unit.num_splits; ++s) {
      const float2 part = __ldcg(reinterpret_cast<const float2*>(x + int64_t{s} * stride));
      out.x += shared.weights[head][s] * part.x;
      out.y += shared.weights[head][s] * part.y;
    }
    *reinterpret_cast<__nv_bfloat162*>(OutRow(p, token, unit.first_head + head) + channel) =
        __floats2bfloat162_rn(out.x, out.y);
  }
}

// Rows that see nothing (padding of a recorded step) get zeros.
template <int kHeadDim>
__device__ void ClearEmptyRows(const DecodeAttentionParams& p,
                               const SharedMemory<kHeadDim>& shared) {
  const int num_heads = p.num_kv_heads * p.heads_per_kv;
  for (int row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    if (shared.rows[row].context != 0) continue;
    for (int i = threadIdx.x; i < num_heads * kHeadDim; i += kThreads) {
      OutRow(p, shared.rows[row].token, i / kHeadDim)[i % kHeadDim] = __float2bfloat16(0);
    }
  }
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kThreads, CtasPerSm(kHeadDim)) void DecodeAttentionKernel(
    const __grid_constant__ DecodeAttentionParams p) {
  __shared__ SharedMemory<kHeadDim> shared;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int num_groups = DecodeGroups(p.num_kv_heads, p.heads_per_kv);
  const int64_t run = int64_t{kBlock} * kHeadDim;
  const int64_t values_at = p.num_kv_heads * run;
  const float scale_log2 = p.scale * 1.44269504f;
  AllowNextKernel();

  PlanRows(p, num_groups, shared);
  const int num_units = shared.first_unit[p.num_rows] * num_groups;

  Fragments<T, kHeadDim> block;
  int slot = 0;  // of the unit at work
  int num_blocks = 0;
  int ids = 0;  // of the warp's blocks, 32 at a time
  const T* head_base = nullptr;
  const auto read_ids = [&](const Unit& unit, int first) {
    if (first + lane < unit.num_blocks) {
      ids = p.block_tables[int64_t{shared.rows[unit.row].seq} * p.max_blocks_per_seq +
                           unit.first_block + (first + lane) * kWarps];
    }
  };
  const auto run_of = [&](int i) {
    return head_base + __shfl_sync(~0u, ids, i % 32) * (2 * values_at);
  };
  const auto take_unit = [&](int index) {
    const Unit unit = FindUnit(p, num_groups, index, shared);
    if (lane == 0) shared.units[slot][warp] = unit;
    __syncwarp();
    num_blocks = unit.num_blocks;
    head_base = static_cast<const T*>(p.kv) + unit.kv_head * run;
    read_ids(unit, 0);
  };
  // Fragments of the next unit's query come from thread 32 * i + lane; heads beyond the last repeat
  // it.
  const auto load_query = [&] {
    const Unit& unit = shared.units[slot][warp];
    return *reinterpret_cast<const uint4*>(
        static_cast<const T*>(p.q) + shared.rows[unit.row].token * p.q_token_stride +
        (unit.first_head + min(g, unit.num_heads - 1)) * p.q_head_stride + (t + 4 * warp) * 8);
  };
  const auto load_first = [&] {
    if (num_blocks == 0) return;
    const T* keys = run_of(0);
    block.LoadKeys(keys, g, t);
    block.LoadValues(keys + values_at, g, t);
  };

  int index = blockIdx.x;
  bool early = false;
  if (index < num_units) {
    take_unit(index);
    // What earlier steps wrote need not wait: all but the block of the row's own token.
    const Unit& unit = shared.units[slot][warp];
    early = p.rows == DecodeRows::kSingleTokens && unit.first_block < (unit.context - 1) / kBlock;
    if (early) load_first();
  }
  WaitForEarlierKernels();
  if (index < num_units) {
    if (!early) load_first();
    if (warp < kHeadDim / 32) shared.query[slot][warp][lane] = load_query();
  }
  ClearEmptyRows(p, shared);
  __syncthreads();

  Accumulator<T, kHeadDim> acc;
  while (index < num_units) {
    int visible_begin, visible_end;  // counted from the first token of the block at hand
    {
      const Unit& unit = shared.units[slot][warp];
      visible_end = unit.context - unit.first_block * kBlock;
      visible_begin = p.window > 0 ? visible_end - p.window : 0;
    }
    acc.Clear();
#pragma unroll 1
    for (int i = 0; i < num_blocks; ++i) {
      float s[4];
      acc.Scores(block, &shared.query[slot][0][lane], s);
      const T* next = nullptr;
      if (i + 1 < num_blocks) {
        if ((i + 1) % 32 == 0) read_ids(shared.units[slot][warp], i + 1);
        next = run_of(i + 1);
        block.LoadKeys(next, g, t);
      }
      if (visible_begin > 0 || visible_end < kBlock) {
        MaskTokens(visible_begin, visible_end, g, t, block, s);
      }
      visible_begin -= kWarps * kBlock;
      visible_end -= kWarps * kBlock;
      uint32_t probs[2];
      acc.Softmax(s, scale_log2, probs);
      acc.AddValues(block, probs);
      if (next != nullptr) block.LoadValues(next + values_at, g, t);
    }

    // The next unit's first block is on its way while this one is merged.
    const int done = index;
    const Unit& unit = shared.units[slot][warp];
    index += gridDim.x;
    slot ^= 1;
    uint4 query = {};
    if (index < num_units) {
      take_unit(index);
      load_first();
      if (warp < kHeadDim / 32) query = load_query();
    }
    StoreWarp(acc, scale_log2, unit.num_heads, shared);
    __syncthreads();
    const int token = shared.rows[unit.row].token;
    const int stride = DecodePartialFloats(p.heads_per_kv, kHeadDim);
    MergeWarps(p, unit, token, p.partials + int64_t{done} * stride, shared);
    if (unit.num_splits > 1) {
      __syncthreads();
      if (threadIdx.x == 0) {
        int32_t* arrivals = p.arrivals + unit.row * num_groups + unit.group;
        const bool is_last = Arrive(arrivals) == unit.num_splits - 1;
        if (is_last) *arrivals = 0;
        shared.is_last = is_last;
      }
      __syncthreads();
      if (shared.is_last) {
        MergeSplits(p, unit, token, p.partials + int64_t{done - unit.split} * stride, shared);
      }
    }
    if (warp < kHeadDim / 32) shared.query[slot][warp][lane] = query;
    __syncthreads();
  }
}

template <typename T>
void LaunchFor(const DecodeAttentionParams& params, int num_sms, cudaStream_t stream) {
  const int units =
      params.num_rows * DecodeGroups(params.num_kv_heads, params.heads_per_kv) * params.max_splits;
  const int grid = std::min(units, num_sms * CtasPerSm(params.head_dim));
  const LaunchShape shape = {.grid = dim3(grid), .block = dim3(kThreads)};
  LaunchKernel(params.head_dim == 64 ? DecodeAttentionKernel<T, 64> : DecodeAttentionKernel<T, 128>,
               shape, stream, params);
}

}  // namespace

void LaunchDecodeAttention(const DecodeAttentionParams& params, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(params.head_dim == 64 || params.head_dim == 128);
  GLOAM_CHECK(params.num_rows > 0 && params.num_rows <= kMaxDecodeRows);
  GLOAM_CHECK(params.max_splits > 0 && params.max_splits <= kMaxSplits);
  if (params.kv_dtype == DType::kBF16) return LaunchFor<__nv_bfloat16>(params, num_sms, stream);
  GLOAM_CHECK(params.kv_dtype == DType::kF16);
  LaunchFor<__half>(params, num_sms, stream);
}

}  // namespace gloam::cuda
