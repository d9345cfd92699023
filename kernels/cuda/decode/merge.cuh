// How the decode kernel merges: the warps' results, and those of the pieces of a context. Part of
// decode_attention.cu.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/decode/units.cuh"

namespace gloam::cuda::decode {

// Counts this thread block in, after all that it wrote (before a barrier of the block). Returns the
// count before.
__device__ __forceinline__ int32_t Arrive(int32_t* count) {
  int32_t before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
}
__device__ __forceinline__ __nv_bfloat16* OutRow(const DecodeAttentionParams& p, int token,
                                                 int head) {
  return static_cast<__nv_bfloat16*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
}

// Four channels of a row's output.
__device__ __forceinline__ void WriteOut(const DecodeAttentionParams& p, int token, int head,
                                         int channel, float4 x) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y),
                                   __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(OutRow(p, token, head) + channel) =
      reinterpret_cast<const uint2&>(pairs);
}

__device__ __forceinline__ void AddScaled(float weight, const float4& x, float4& sum) {
  sum.x += weight * x.x;
  sum.y += weight * x.y;
  sum.z += weight * x.z;
  sum.w += weight * x.w;
}

// What the warps that merge do, unit after unit behind those that compute.
template <int kHeadDim>
class Merger {
 public:
  __device__ __forceinline__ Merger(const DecodeAttentionParams& p, int num_groups,
                                    SharedMemory<kHeadDim>& shared)
      : p_(p),
        num_groups_(num_groups),
        shared_(shared),
        units_(p, num_groups, shared),
        thread_(threadIdx.x - kComputeThreads),
        results_(shared.results),
        stride_(DecodePartialFloats(p.heads_per_unit, kHeadDim)) {}

  __device__ void Run();

 private:
  static constexpr int kQuads = kHeadDim / 4;  // of a head's channels: what a thread merges

  // Rows that see nothing (padding of a recorded step) get zeros.
  __device__ void ClearEmptyRows();
  // Merges the warps' results into the row's output, or, where it has several pieces, a partial.
  __device__ __forceinline__ void MergeWarps(const Unit& unit, float* partial);
  // Merges the pieces' partials of a row and group; `first` is that of the first piece.
  __device__ __forceinline__ void MergeSplits(const Unit& unit, const float* first);
  // A head's share of the pieces, to results_.weights; by one warp.
  __device__ __forceinline__ void WeighSplits(const Unit& unit, const float* first, int head);
  __device__ __forceinline__ void LoadParts(const Unit& unit, const float* first, int quad,
                                            int begin, float4 (&parts)[kMergeLoads]) const;

  const DecodeAttentionParams& p_;
  const int num_groups_;
  SharedMemory<kHeadDim>& shared_;
  const Units<kHeadDim> units_;
  const int thread_;
  WarpResults<kHeadDim>& results_;
  const int stride_;  // of partials
};

template <int kHeadDim>
__device__ void Merger<kHeadDim>::ClearEmptyRows() {
  const int num_heads = p_.num_kv_heads * p_.heads_per_kv;
  for (int row = blockIdx.x; row < p_.num_rows; row += gridDim.x) {
    if (shared_.rows[row].context != 0) continue;
    for (int i = thread_; i < num_heads * kQuads; i += kMergeThreads) {
      WriteOut(p_, shared_.rows[row].token, i / kQuads, i % kQuads * 4, {0, 0, 0, 0});
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Merger<kHeadDim>::MergeWarps(const Unit& unit, float* partial) {
  for (int i = thread_; i < unit.num_heads * kQuads; i += kMergeThreads) {
    const int head = i / kQuads;
    const int channel = i % kQuads * 4;
    float max = results_.max[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) max = fmaxf(max, results_.max[w][head]);
    float4 out = {0, 0, 0, 0};
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(results_.max[w][head] - max);
      AddScaled(weight, *reinterpret_cast<const float4*>(&results_.out[w][head][channel]), out);
      sum += weight * results_.sum[w][head];
    }
    if (unit.num_splits == 1) {
      const float scale = 1 / sum;
      WriteOut(p_, shared_.rows[unit.row].token, unit.first_head + head, channel,
               {out.x * scale, out.y * scale, out.z * scale, out.w * scale});
    } else {
      __stcg(reinterpret_cast<float4*>(partial + head * kHeadDim + channel), out);
      if (channel == 0) {
        __stcg(reinterpret_cast<float2*>(partial + p_.heads_per_unit * kHeadDim + 2 * head),
               float2{max, sum});
      }
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Merger<kHeadDim>::WeighSplits(const Unit& unit, const float* first,
                                                              int head) {
  const int lane = thread_ % 32;
  float2 stats[kMaxDecodeSplits / 32];  // maximum and sum of pieces lane, lane + 32, ...
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMaxDecodeSplits / 32; ++i) {
    const int s = lane + 32 * i;
    stats[i] = {-INFINITY, 0};
    if (s < unit.num_splits) {
      stats[i] = __ldcg(reinterpret_cast<const float2*>(first + int64_t{s} * stride_ +
                                                        p_.heads_per_unit * kHeadDim + 2 * head));
    }
    max = fmaxf(max, stats[i].x);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, mask));
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxDecodeSplits / 32; ++i) {
    stats[i].x = exp2f(stats[i].x - max);
    sum += stats[i].x * stats[i].y;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
#pragma unroll
  for (int i = 0; i < kMaxDecodeSplits / 32; ++i) {
    results_.weights[head][lane + 32 * i] = stats[i].x / sum;
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Merger<kHeadDim>::LoadParts(const Unit& unit, const float* first,
                                                            int quad, int begin,
                                                            float4 (&parts)[kMergeLoads]) const {
  const float* x = first + quad / kQuads * kHeadDim + quad % kQuads * 4;
#pragma unroll
  for (int s = 0; s < kMergeLoads; ++s) {
    parts[s] = {0, 0, 0, 0};
    if (quad < unit.num_heads * kQuads && begin + s < unit.num_splits) {
      parts[s] = __ldcg(reinterpret_cast<const float4*>(x + int64_t{begin + s} * stride_));
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void Merger<kHeadDim>::MergeSplits(const Unit& unit,
                                                              const float* first) {
  float4 parts[kMergeLoads];
  LoadParts(unit, first, thread_, 0, parts);  // while the weights are found
  for (int head = thread_ / 32; head < unit.num_heads; head += kMergeWarps) {
    WeighSplits(unit, first, head);
  }
  WaitForMergers();
  for (int i = thread_; i < unit.num_heads * kQuads; i += kMergeThreads) {
    const int head = i / kQuads;
    float4 out = {0, 0, 0, 0};
    for (int begin = 0; begin < unit.num_splits; begin += kMergeLoads) {
      if (i != thread_ || begin != 0) LoadParts(unit, first, i, begin, parts);
#pragma unroll
      for (int s = 0; s < kMergeLoads; ++s) {
        AddScaled(results_.weights[head][begin + s], parts[s], out);  // 0 from num_splits on
      }
    }
    WriteOut(p_, shared_.rows[unit.row].token, unit.first_head + head, i % kQuads * 4, out);
  }
}

template <int kHeadDim>
__device__ void Merger<kHeadDim>::Run() {
  ClearEmptyRows();
  int num_done = 0;  // units
  for (int at = units_.begin(); at < units_.end(); ++num_done) {
    const Unit unit = units_.Find(at);
    at = unit.next;
    results_.full.Wait(num_done);
    MergeWarps(unit, p_.partials + int64_t{unit.partial} * stride_);
    results_.empty.Arrive();
    if (unit.num_splits == 1) continue;
    WaitForMergers();
    if (thread_ == 0) {
      int32_t* arrivals = p_.arrivals + unit.row * num_groups_ + unit.group;
      results_.is_last = Arrive(arrivals) == unit.num_splits - 1;
      if (results_.is_last) {
        *arrivals = 0;
        __threadfence();  // before the others' partials are read
      }
    }
    WaitForMergers();
    if (results_.is_last) {
      MergeSplits(unit, p_.partials + int64_t{unit.partial - unit.split} * stride_);
    }
  }
}

}  // namespace gloam::cuda::decode
