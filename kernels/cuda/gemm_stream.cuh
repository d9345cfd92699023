// The streaming product: y = x W^T for few rows of x, limited by reading W once from memory.
//
// A thread block owns a contiguous range of units (16 rows of W) and walks it in chunks of
// Format::kUnits. Its warps split the columns: warp w takes stages w, w + kWarps, ... of every
// chunk. Each warp keeps a ring of stages of its own in shared memory, filled by asynchronous
// copies that run ahead over the chunks' borders, so that reading never pauses; no barrier is
// needed but the two around a chunk's reduction. Tensor cores multiply with W as the 16-row operand
// and eight rows of x as the other. The first stages of W are requested before the earlier kernel
// has finished: weights never change.
//
// Order of summation: within a warp by columns, then warps 0, 1, ...: it depends on the number of
// columns and the format, never on the rows of x or of W.
//
// Bytes: those of W, plus m * k * 2 / (16 * kUnits * k * bytes of a weight) as much of x from L2.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/gemm_params.h"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes; zeros where `valid` is false, and then `source` is not read.
__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Brings a line of 128 bytes to L2.
__device__ __forceinline__ void PrefetchLine(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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
    default:
      return WaitForCopies<6>();
  }
}
inline constexpr int kMaxStages = 8;

// c += a b: a is 16 rows of W by 16 columns, b 16 columns by 8 rows of x.
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

// What a warp has still to request: the stages of its columns, chunk after chunk.
template <typename Format>
struct StageProducer {
  const StreamGemmParams& params;
  const int end_unit;
  const int own_slices;
  const int warp;
  const int lane;
  int chunk_unit;  // first unit of the current chunk
  int slice = 0;   // of this warp's
  typename Format::Source sources[Format::kUnits];

  __device__ __forceinline__ StageProducer(const StreamGemmParams& p, int first, int end, int own,
                                           int warp_index, int lane_index)
      : params(p),
        end_unit(end),
        own_slices(own),
        warp(warp_index),
        lane(lane_index),
        chunk_unit(first) {
    if (own > 0) FindSources();
  }

  __device__ __forceinline__ bool done() const { return own_slices == 0 || chunk_unit >= end_unit; }
  __device__ __forceinline__ int stage() const { return warp + slice * Format::kWarps; }

  __device__ __forceinline__ void FindSources() {
#pragma unroll
    for (int u = 0; u < Format::kUnits; ++u) {
      const int unit = chunk_unit + u;
      if (unit >= end_unit) {
        sources[u] = {};
        continue;
      }
      const GemmSegment& segment = params.segments[SegmentOf(params, unit)];
      sources[u] = Format::FindSource(segment, unit - segment.first_unit, params.k, lane);
    }
  }

  __device__ __forceinline__ void RequestWeights(char* stage_memory) const {
#pragma unroll
    for (int u = 0; u < Format::kUnits; ++u) {
      Format::Request(sources[u], stage_memory + u * Format::kUnitBytes, stage(), params.k, lane);
    }
  }

  __device__ __forceinline__ void PrefetchWeights() const {
#pragma unroll
    for (int u = 0; u < Format::kUnits; ++u) {
      Format::Prefetch(sources[u], stage(), params.k, lane);
    }
  }

  __device__ __forceinline__ void Advance() {
    if (++slice == own_slices) {
      slice = 0;
      chunk_unit += Format::kUnits;
      FindSources();
    }
  }
};

template <typename Format>
__device__ __forceinline__ void RequestX(const StreamGemmParams& params, char* x_memory, int stage,
                                         int lane) {
  constexpr int kChunks = Format::kColumns / 8;
  for (int i = lane; i < params.m * kChunks; i += 32) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int column = stage * Format::kColumns + 8 * chunk;
    const bool valid = column < params.k;
    const auto* source =
        static_cast<const __nv_bfloat16*>(params.x) + row * params.x_stride + (valid ? column : 0);
    CopyAsync16(
        SharedAddress(x_memory) + row * (2 * Format::kColumns) + 16 * SwizzledChunk(row, chunk),
        source, valid);
  }
}

template <typename Format, int kTiles>
struct Reduction {
  static constexpr int kRows = Format::kUnits * kUnitRows;
  static constexpr int kRowStride = kRows + 4;  // of one row of x; keeps the writes off each other
  static constexpr int kWarpFloats = 8 * kTiles * kRowStride;
  static constexpr int kBytes = Format::kWarps * kWarpFloats * 4;
};

template <typename Format, int kTiles>
__device__ __forceinline__ void StorePartialSums(const float (&acc)[Format::kUnits][kTiles][4],
                                                 float* warp_sums, int lane) {
  using R = Reduction<Format, kTiles>;
#pragma unroll
  for (int u = 0; u < Format::kUnits; ++u) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * n + 2 * (lane % 4) + c % 2;
        const int row = kUnitRows * u + lane / 4 + 8 * (c / 2);
        warp_sums[token * R::kRowStride + row] = acc[u][n][c];
      }
    }
  }
}

// What is left to do with the sum of one element: scale, bias, residual. No fused operations: the
// kernels that share this agree to the last bit.
template <typename Format>
__device__ __forceinline__ void StoreOutput(const StreamGemmParams& params, int unit,
                                            int row_in_unit, int token, float value) {
  const GemmSegment& segment = params.segments[SegmentOf(params, unit)];
  const int row = (unit - segment.first_unit) * kUnitRows + row_in_unit;
  if (row >= segment.rows) return;
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

template <typename Format, int kTiles>
__device__ __forceinline__ void ReduceAndStore(const StreamGemmParams& params, int chunk_unit,
                                               int end_unit, const float* sums) {
  using R = Reduction<Format, kTiles>;
  for (int i = threadIdx.x; i < params.m * R::kRows; i += Format::kWarps * 32) {
    const int token = i / R::kRows;
    const int row = i % R::kRows;
    const int unit = chunk_unit + row / kUnitRows;
    if (unit >= end_unit) continue;
    float value = 0;
#pragma unroll
    for (int w = 0; w < Format::kWarps; ++w) {
      value += sums[w * R::kWarpFloats + token * R::kRowStride + row];
    }
    StoreOutput<Format>(params, unit, row % kUnitRows, token, value);
  }
}

template <typename Format, int kTiles>
__global__ void __launch_bounds__(Format::kWarps * 32)
    StreamGemmKernel(const __grid_constant__ StreamGemmParams params, int units_per_block,
                     int num_stages, int stage_bytes, int num_prefetched) {
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_unit = blockIdx.x * units_per_block;
  const int end_unit = min(first_unit + units_per_block, params.num_units);
  const int num_slices = (params.k + Format::kColumns - 1) / Format::kColumns;
  const int own_slices = (num_slices - warp + Format::kWarps - 1) / Format::kWarps;
  char* ring = shared + warp * num_stages * stage_bytes;
  auto* sums = reinterpret_cast<float*>(shared + Format::kWarps * num_stages * stage_bytes);

  StageProducer<Format> producer(params, first_unit, end_unit, max(own_slices, 0), warp, lane);
  {
    for (int i = 0; i < num_stages - 1 && !producer.done(); ++i) {
      producer.RequestWeights(ring + i * stage_bytes);
      producer.Advance();
    }
    // And to L2 what memory can deliver until the last kernel's results are there.
    StageProducer<Format> ahead = producer;
    for (int i = 0; i < num_prefetched && !ahead.done(); ++i) {
      ahead.PrefetchWeights();
      ahead.Advance();
    }
    WaitForEarlierKernels();
    const int num_chunks = (end_unit - first_unit + Format::kUnits - 1) / Format::kUnits;
    const int total = num_chunks * producer.own_slices;
    for (int i = 0; i < min(num_stages - 1, total); ++i) {
      RequestX<Format>(params, ring + i * stage_bytes + Format::kUnits * Format::kUnitBytes,
                       warp + i % producer.own_slices * Format::kWarps, lane);
    }
    CommitCopies();
    WaitForCopies<0>();
  }

  int slot = 0;
  int free_slot = num_stages - 1;  // the one that was read last
  for (int unit = first_unit; unit < end_unit; unit += Format::kUnits) {
    float acc[Format::kUnits][kTiles][4] = {};
    for (int i = 0; i < own_slices; ++i) {
      WaitForCopies(num_stages - 2);
      __syncwarp();
      if (!producer.done()) {
        char* memory = ring + free_slot * stage_bytes;
        producer.RequestWeights(memory);
        RequestX<Format>(params, memory + Format::kUnits * Format::kUnitBytes, producer.stage(),
                         lane);
        producer.Advance();
      }
      CommitCopies();
      const char* stage = ring + slot * stage_bytes;
      Format::template Multiply<kTiles>(stage, stage + Format::kUnits * Format::kUnitBytes,
                                        params.m, lane, acc);
      free_slot = slot;
      slot = slot + 1 == num_stages ? 0 : slot + 1;
    }
    __syncthreads();  // the last chunk's sums have been read
    StorePartialSums<Format, kTiles>(acc, sums + warp * Reduction<Format, kTiles>::kWarpFloats,
                                     lane);
    __syncthreads();
    ReduceAndStore<Format, kTiles>(params, unit, end_unit, sums);
  }
}

// Bytes of a stage: kUnits of W and `m` rows of x.
template <typename Format>
int StageBytes(int m) {
  return (Format::kUnits * Format::kUnitBytes + m * Format::kColumns * 2 + 127) / 128 * 128;
}

// Stages of the ring: as many as fit into the shared memory that a block is meant to have; where
// that leaves fewer than three, into what it may have.
template <typename Format, int kTiles>
int NumStages(int m, const StreamGemmDevice& device) {
  const auto fit = [&](int bytes) {
    return (bytes - Reduction<Format, kTiles>::kBytes) / (Format::kWarps * StageBytes<Format>(m));
  };
  int stages = fit(device.block_shared_bytes);
  if (stages < 3) stages = fit(device.max_shared_bytes);
  return stages < kMaxStages ? stages : kMaxStages;
}

template <typename Format, int kTiles>
void LaunchStreamGemm(const StreamGemmParams& params, const StreamGemmDevice& device) {
  const auto kernel = StreamGemmKernel<Format, kTiles>;
  static const bool prepared = [&] {
    GLOAM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          device.max_shared_bytes));
    GLOAM_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
    return true;
  }();
  static_cast<void>(prepared);
  const int stage_bytes = StageBytes<Format>(params.m);
  const int num_stages = NumStages<Format, kTiles>(params.m, device);
  const int units_per_block = (params.num_units + device.num_sms - 1) / device.num_sms;
  const size_t shared_bytes = static_cast<size_t>(Format::kWarps) * num_stages * stage_bytes +
                              Reduction<Format, kTiles>::kBytes;
  const int grid = (params.num_units + units_per_block - 1) / units_per_block;
  LaunchKernel(
      kernel,
      {.grid = dim3(grid), .block = dim3(Format::kWarps * 32), .shared_bytes = shared_bytes},
      device.stream, params, units_per_block, num_stages, stage_bytes,
      device.prefetch_bytes / (Format::kWarps * Format::kUnits * Format::kUnitBytes));
}

// Rows of x that one launch takes, at most 8 * kMaxTiles: a ring needs two stages.
template <typename Format, int kMaxTiles>
int MaxRows(const StreamGemmDevice& device) {
  if constexpr (kMaxTiles >= 4) {
    if (NumStages<Format, 4>(32, device) >= 2) return 32;
  }
  if (NumStages<Format, 2>(16, device) >= 2) return 16;
  int rows = 8;
  while (rows > 1 && NumStages<Format, 1>(rows, device) < 2) --rows;
  return rows;
}

template <typename Format, int kMaxTiles>
void StreamGemm(const StreamGemmParams& all, const StreamGemmDevice& device) {
  const int max_rows = MaxRows<Format, kMaxTiles>(device);
  StreamGemmParams params = all;
  for (int row = 0; row < all.m; row += max_rows) {
    params.m = all.m - row < max_rows ? all.m - row : max_rows;
    params.x = static_cast<const __nv_bfloat16*>(all.x) + row * all.x_stride;
    for (int i = 0; i < all.num_segments; ++i) {
      const GemmSegment& segment = all.segments[i];
      params.segments[i].y =
          static_cast<char*>(segment.y) + row * segment.y_stride * (segment.y_is_bf16 ? 2 : 4);
    }
    if (params.m <= 8) {
      LaunchStreamGemm<Format, 1>(params, device);
    } else if (params.m <= 16) {
      LaunchStreamGemm<Format, 2>(params, device);
    } else if constexpr (kMaxTiles >= 4) {
      LaunchStreamGemm<Format, 4>(params, device);
    }
  }
}

}  // namespace gloam::cuda
