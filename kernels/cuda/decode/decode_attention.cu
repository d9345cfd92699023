// One query token of each row against its context.
//
// A unit of work is a row, a group of up to 8 query heads that share a KV head, and a piece of the
// context. One thread block per SM strides over the units, or, in large batches, has a stretch of
// all contexts' blocks. Each of 8 warps takes every eighth block of 16 tokens of the piece and
// keeps a softmax of its own. Further warps merge the 8 results,
// which come through shared memory, and, in the thread block that finishes a row and group last,
// the pieces' results, which come through global memory; always in ascending order.
//
// Memory does not idle meanwhile: keys and values stream through a ring in shared memory that
// belongs to the warp, which asks for what it will need some 8 KB ahead, beyond the end of the
// unit at hand. Only warps without loads in flight order their writes (a fence waits for all of
// them).
//
// Both products use mma.m16n8k16 with tokens (channels) as its 16 rows and query heads as its 8
// columns: S^T = K Q^T and O^T = V^T P^T. Of lane = 4 * g + t, a result has rows g and g + 8 of
// columns 2t and 2t + 1.
#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/decode/decode_attention.h"
#include "kernels/cuda/decode/merge.cuh"
#include "kernels/cuda/decode/tiles.cuh"
#include "kernels/cuda/decode/units.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace decode {

// 16 bytes, with a policy for the lines in L2.
__device__ __forceinline__ void CopyAsync(uint32_t shared, const void* global, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
      "l"(global), "l"(policy)
      : "memory");
}

// Of keys and values. Those of single tokens' sequences are read once: what the next kernels read
// stays in L2 instead (the step of 256 rows of Llama-3.1-8B at 1,024 tokens on an H100: 19.55 ms
// without, 19.39 with).
template <DecodeRows kRows>
__device__ __forceinline__ uint64_t CachePolicy() {
  uint64_t policy;
  if constexpr (kRows == DecodeRows::kSingleTokens) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
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

// Tokens behind the context are left out so many at a time, where rows are single tokens: the
// tokens of a chunk read the same blocks, and the question alone cost them 6 %. Step of
// Llama-3.1-8B by 256, 128 and 8 sequences of 1,024, 1,024 and 2,048 tokens, ms (H100, 2026-11-27):
// all read 18.92, 12.10, 6.31, by four 18.88, 12.07, 6.31; one by one, before the head's
// candidates, 18.98 after 19.05, 12.22 after 12.24, 6.36 after 6.33.
constexpr int kTokensAtOnce = 4;

// What a warp asks memory for: runs of keys and values in turn, unit after unit.
template <typename T, int kHeadDim, DecodeRows kRows>
class RunStream {
 public:
  __device__ __forceinline__ RunStream(const DecodeAttentionParams& p, int num_groups,
                                       SharedMemory<kHeadDim>& shared)
      : p_(p),
        shared_(shared),
        units_(p, num_groups, shared),
        lane_(threadIdx.x % 32),
        policy_(CachePolicy<kRows>()) {
    LookUp(units_.begin());
    TakeUnit();
  }

  // Whether the next run may be asked for before the earlier kernels are done: all was written by
  // earlier steps but the block of the row's own token.
  __device__ __forceinline__ bool IsOld() const {
    return kRows == DecodeRows::kSingleTokens && index_ < units_.end() &&
           unit_.first_block + block_ * kWarps < (unit_.context - 1) / kBlock;
  }

  // Asks for the next run, if there is one, to lie at `to`, as one group of copies; not for most
  // of the tokens behind the context: in their place is what was there before.
  __device__ __forceinline__ void Copy(uint32_t to) {
    using R = Run<T, kHeadDim>;
    if (index_ < units_.end()) {
      const int64_t values_at = int64_t{p_.num_kv_heads} * kBlock * kHeadDim;
      const T* from = static_cast<const T*>(p_.kv) +
                      __shfl_sync(~0u, ids_, block_ % 32) * (2 * values_at) +
                      unit_.kv_head * (kBlock * kHeadDim) + (is_values_ ? values_at : 0);
      const int visible = unit_.context - (unit_.first_block + block_ * kWarps) * kBlock;
#pragma unroll
      for (int i = 0; i < kBlock * R::kRowChunks / 32; ++i) {
        const int token = i * (32 / R::kRowChunks) + lane_ / R::kRowChunks;
        const int first = i * (32 / R::kRowChunks) / kTokensAtOnce * kTokensAtOnce;
        if (kRows == DecodeRows::kSingleTokens && first > 0 && first >= visible) break;
        CopyAsync(to + R::Offset(token, lane_ % R::kRowChunks),
                  from + (i * 32 + lane_) * (16 / sizeof(T)), policy_);
      }
      Advance();
    }
    CommitCopies();
  }

 private:
  __device__ __forceinline__ void Advance() {
    is_values_ = !is_values_;
    if (is_values_) return;
    ++block_;
    if (block_ == unit_.num_blocks) {
      TakeUnit();
    } else if (block_ % 32 == 0) {
      ids_ = ReadIds(unit_, block_);
    }
  }

  // Goes on to the unit that was looked up, and looks up the one after it: its block ids take a
  // while.
  __device__ __forceinline__ void TakeUnit() {
    index_ = next_index_;
    unit_ = next_unit_;
    ids_ = next_ids_;
    block_ = 0;
    if (index_ < units_.end()) LookUp(unit_.next);
  }

  // Looks up the first unit from `index` on in which the warp has a block.
  __device__ __forceinline__ void LookUp(int index) {
    for (; index < units_.end(); index = next_unit_.next) {
      next_unit_ = units_.Find(index);
      if (next_unit_.num_blocks > 0) break;
    }
    next_index_ = index;
    if (index < units_.end()) next_ids_ = ReadIds(next_unit_, 0);
  }

  // Block ids of the unit from the warp's `first` on, one in each lane.
  __device__ __forceinline__ int ReadIds(const Unit& unit, int first) const {
    const int block = first + lane_;
    if (block >= unit.num_blocks) return 0;
    return p_.block_tables[int64_t{shared_.rows[unit.row].seq} * p_.max_blocks_per_seq +
                           unit.first_block + block * kWarps];
  }

  const DecodeAttentionParams& p_;
  const SharedMemory<kHeadDim>& shared_;
  const Units<kHeadDim> units_;
  const int lane_;
  const uint64_t policy_;
  int index_ = 0;  // of the unit
  Unit unit_;
  int block_ = 0;  // of the warp's blocks of the unit
  int ids_ = 0;
  bool is_values_ = false;  // the block's keys were asked for
  int next_index_ = 0;
  Unit next_unit_;
  int next_ids_ = 0;
};

// The query heads of a unit: for each 16 channels the fragments of head g, channels in the order of
// the keys' tiles. Heads beyond the last repeat it.
template <typename T, int kHeadDim>
struct Query {
  using Half = typename Tiles<T>::Half;

  uint32_t words[kHeadDim / 16][2];

  __device__ __forceinline__ void Load(const DecodeAttentionParams& p, const Unit& unit,
                                       int token) {
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
    const Half* head = static_cast<const Half*>(p.q) + token * p.q_token_stride +
                       (unit.first_head + min(g, unit.num_heads - 1)) * p.q_head_stride;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Half* pair = head + 16 * i + Tiles<T>::KeyChannel(t, j);
        words[i][j] = *reinterpret_cast<const uint32_t*>(pair);
      }
    }
  }
};

// Scores of tokens g (0, 1) and g + 8 (2, 3) of a run of keys, heads 2t and 2t + 1.
template <typename T, int kHeadDim>
__device__ __forceinline__ void Scores(uint32_t keys, const Query<T, kHeadDim>& q, float (&s)[4]) {
  using R = Run<T, kHeadDim>;
  constexpr int kTiles = Tiles<T>::kPerLoad;
  const int lane = threadIdx.x % 32;
  const uint32_t row = R::Offset(lane % 16, lane / 16);
  float odd[4] = {0, 0, 0, 0};  // a second sum, because a product waits for the one before
  s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
  for (int i = 0; i < R::kLoads; ++i) {
    uint32_t x[4];
    LoadMatrices(keys + (row ^ (32 * i)), x);
#pragma unroll
    for (int tile = i * kTiles; tile < (i + 1) * kTiles; ++tile) {
      uint32_t a[4];
      Tiles<T>::Keys(x, tile % kTiles, a);
      Mma<typename Tiles<T>::Half>(tile % 2 == 0 ? s : odd, a, q.words[tile][0], q.words[tile][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] += odd[i];
}

// A warp's softmax so far, of heads 2t and 2t + 1.
template <typename T, int kHeadDim>
struct Accumulator {
  static constexpr int kTiles = kHeadDim / 16;

  using Half = typename Tiles<T>::Half;

  float out[kTiles][4];  // 16 channels each, in the order of the values' tiles: rows g and g + 8
  float max[2];
  float sum[2];  // of the tokens of this lane

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0;
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Takes the scores in; `p` is what the values are multiplied by.
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
    p[0] = Transpose8x8(Pack<Half>(prob[0], prob[1]));
    p[1] = Transpose8x8(Pack<Half>(prob[2], prob[3]));
  }

  // Adds a run of values times `p`.
  __device__ __forceinline__ void AddValues(uint32_t values, const uint32_t (&p)[2]) {
    using R = Run<T, kHeadDim>;
    const int lane = threadIdx.x % 32;
    const uint32_t row = R::Offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < R::kLoads; ++i) {
      uint32_t x[4];
      LoadTransposed(values + (row ^ (32 * i)), x);
#pragma unroll
      for (int j = 0; j < Tiles<T>::kPerLoad; ++j) {
        uint32_t a[4];
        Tiles<T>::Values(x, j, a);
        Mma<Half>(out[i * Tiles<T>::kPerLoad + j], a, p[0], p[1]);
      }
    }
  }

  // Leaves the warp's result in shared memory.
  __device__ __forceinline__ void Store(float scale_log2, int num_heads,
                                        WarpResults<kHeadDim>& results) const {
    const int warp = threadIdx.x / 32;
    const int g = threadIdx.x % 32 / 4;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = SumOverTokens(sum[h]);
      const int head = 2 * t + h;
      if (head >= num_heads) continue;
      if (g == 0) {
        results.max[warp][head] = max[h] * scale_log2;
        results.sum[warp][head] = total;
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        results.out[warp][head][16 * i + Tiles<T>::ValueChannel(g)] = out[i][h];
        results.out[warp][head][16 * i + Tiles<T>::ValueChannel(g + 8)] = out[i][h + 2];
      }
    }
  }
};

// What lies in the tokens of an edge block that the row does not see may be anything, NaN too: zero
// the values. Those from `end` on and those before `begin`.
template <typename R>
__device__ __forceinline__ void ClearHiddenValues(char* values, int begin, int end) {
  for (int i = threadIdx.x % 32; i < R::kBytes / 16; i += 32) {
    const int token = i / R::kRowChunks;
    if (token < begin || token >= end) reinterpret_cast<uint4*>(values)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

// What the computing warps do. Waits for earlier kernels.
template <typename T, int kHeadDim, DecodeRows kRows>
__device__ void ComputeUnits(const DecodeAttentionParams& p, int num_groups,
                             SharedMemory<kHeadDim>& shared) {
  using R = Run<T, kHeadDim>;
  constexpr int kAhead = R::kPerRing - 1;  // runs that are asked for beyond the one at hand
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const Units<kHeadDim> units(p, num_groups, shared);
  const float scale_log2 = p.scale * 1.44269504f;
  RunStream<T, kHeadDim, kRows> stream(p, num_groups, shared);
  const uint32_t ring = SharedAddress(shared.rings[warp]);
  int asked = 0;
  for (; asked < kAhead && stream.IsOld(); ++asked) stream.Copy(ring + asked * R::kBytes);
  WaitForEarlierKernels();
  for (; asked < kAhead; ++asked) stream.Copy(ring + asked * R::kBytes);

  int at_hand = 0;        // run of the ring
  int free_run = kAhead;  // the one before, read already
  // The next run to read; when it is there, another is asked for in place of the one before.
  const auto next_run = [&] {
    WaitForCopies<kAhead - 1>();
    __syncwarp();
    stream.Copy(ring + free_run * R::kBytes);
    free_run = at_hand;
    at_hand = at_hand + 1 == R::kPerRing ? 0 : at_hand + 1;
    return free_run;
  };

  Unit unit;
  Query<T, kHeadDim> next_query;
  const auto load_query = [&](int index) {
    if (index >= units.end()) return;
    unit = units.Find(index);
    next_query.Load(p, unit, shared.rows[unit.row].token);
  };
  load_query(units.begin());
  int num_done = 0;  // units
  for (int index = units.begin(); index < units.end();) {
    const Query<T, kHeadDim> query = next_query;
    const int num_blocks = unit.num_blocks;
    const int num_heads = unit.num_heads;
    // Tokens that the row sees, counted from the first of the block at hand.
    int visible_end = unit.context - unit.first_block * kBlock;
    int visible_begin = p.window > 0 ? visible_end - p.window : 0;
    index = unit.next;
    load_query(index);
    Accumulator<T, kHeadDim> acc;
    acc.Clear();
#pragma unroll 1
    for (int i = 0; i < num_blocks; ++i) {
      float s[4];
      Scores<T, kHeadDim>(ring + next_run() * R::kBytes, query, s);
      const bool is_edge = visible_begin > 0 || visible_end < kBlock;
      if (is_edge) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int token = g + j / 2 * 8;
          if (token < visible_begin || token >= visible_end) s[j] = -INFINITY;
        }
      }
      uint32_t probs[2];
      acc.Softmax(s, scale_log2, probs);
      const int values = next_run();
      if (is_edge) {
        ClearHiddenValues<R>(shared.rings[warp] + values * R::kBytes, visible_begin, visible_end);
      }
      acc.AddValues(ring + values * R::kBytes, probs);
      visible_begin -= kWarps * kBlock;
      visible_end -= kWarps * kBlock;
    }
    if (num_done > 0) shared.results.empty.Wait(num_done - 1);
    acc.Store(scale_log2, num_heads, shared.results);
    shared.results.full.Arrive();
    ++num_done;
  }
}

template <typename T, int kHeadDim, DecodeRows kRows>
__global__ __launch_bounds__(kThreads, 1) void DecodeAttentionKernel(
    const __grid_constant__ DecodeAttentionParams p) {
  extern __shared__ char shared_bytes[];
  auto& shared = *reinterpret_cast<SharedMemory<kHeadDim>*>(shared_bytes);
  const int num_groups = DecodeGroups(p.num_kv_heads, p.heads_per_kv, p.heads_per_unit);
  AllowNextKernel();
  PlanRows(p, num_groups, shared);
  if (threadIdx.x < kComputeThreads) {
    ComputeUnits<T, kHeadDim, kRows>(p, num_groups, shared);
  } else {
    WaitForEarlierKernels();
    Merger<kHeadDim>(p, num_groups, shared).Run();
  }
}

template <typename T, int kHeadDim, DecodeRows kRows>
void LaunchFor(const DecodeAttentionParams& params, const DecodeDevice& device) {
  constexpr auto kKernel = DecodeAttentionKernel<T, kHeadDim, kRows>;
  const int shared_bytes = SharedBytes<kHeadDim>(device.compute_capability);
  AllowSharedBytes<kKernel>(shared_bytes);
  const int num_groups =
      DecodeGroups(params.num_kv_heads, params.heads_per_kv, params.heads_per_unit);
  const int units = params.num_rows * num_groups * params.max_splits;
  const LaunchShape shape = {.grid = dim3(std::min(units, device.num_sms)),
                             .block = dim3(kThreads),
                             .shared_bytes = static_cast<size_t>(shared_bytes)};
  LaunchKernel(kKernel, shape, device.stream, params);
}

template <typename T, int kHeadDim>
void LaunchForRows(const DecodeAttentionParams& params, const DecodeDevice& device) {
  params.rows == DecodeRows::kSingleTokens
      ? LaunchFor<T, kHeadDim, DecodeRows::kSingleTokens>(params, device)
      : LaunchFor<T, kHeadDim, DecodeRows::kEveryToken>(params, device);
}

template <typename T>
void LaunchForType(const DecodeAttentionParams& params, const DecodeDevice& device) {
  params.head_dim == 64 ? LaunchForRows<T, 64>(params, device)
                        : LaunchForRows<T, 128>(params, device);
}

}  // namespace decode

void LaunchDecodeAttention(const DecodeAttentionParams& params, const DecodeDevice& device) {
  GLOAM_CHECK(params.head_dim == 64 || params.head_dim == 128);
  GLOAM_CHECK(params.num_rows > 0 && params.num_rows <= kMaxDecodeRows);
  GLOAM_CHECK(params.heads_per_unit > 0 &&
              params.heads_per_unit <= DecodeHeads(device.compute_capability));
  GLOAM_CHECK(params.max_splits > 0 && params.max_splits <= kMaxDecodeSplits);
  switch (params.kv_dtype) {
    case DType::kBF16:
      return decode::LaunchForType<__nv_bfloat16>(params, device);
    case DType::kF16:
      return decode::LaunchForType<__half>(params, device);
    case DType::kF8E4M3:
      return decode::LaunchForType<E4M3>(params, device);
    default:
      GLOAM_CHECK(!"the cache on CUDA is bf16, fp16 or fp8 (e4m3)");
  }
}

}  // namespace gloam::cuda
