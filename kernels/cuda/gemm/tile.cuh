// The tiled product: y = x W^T for many rows of x, with exactly the sums of the streaming product
// (stream.cuh) and so the same bits: a row's result does not depend on how many rows a step
// has. A block makes a tile of 128 rows of W by 32 * kTiles of x: its warps lie four along x, of
// 8 * kTiles rows of it each. It walks the columns in the streaming product's order: the stages of
// its warp 0, then of warp 1, ...
//
// Where the tiles are too few for the device, the two or four blocks of a cluster compute the parts
// of the sums (kSumParts) and add them up out of each other's shared memory.
//
// FLOPs: 2 m n k, by mma.sync, which reaches about 60 % of what Hopper's wgmma does.
#pragma once

#include <algorithm>

#include "kernels/cuda/gemm/cluster_sums.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {

template <typename Format, int kTiles, int kWarps>
struct TileShape {
  static constexpr int kTokenWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kUnits = 8;
  static constexpr int kRowWarps = kWarps / kTokenWarps;
  static constexpr int kWarpUnits = kUnits / kRowWarps;
  static constexpr int kTokens = kTokenWarps * kTiles * 8;
  static constexpr int kRowBytes = Format::kColumns * 2;  // of x
  static constexpr int kStageBytes = kUnits * Format::kUnitBytes + kTokens * kRowBytes;
  static constexpr int kRows = kUnits * kUnitRows;
  static constexpr int kSumStride = kRows + 4;  // of one row of x; keeps the writes off each other
  static constexpr int kSumBytes = kTokens * kSumStride * 4;
  static constexpr int kMaxBlocks = kSumParts;  // of a cluster
  static_assert(kUnits <= kWarps);              // some warps request a unit each
};

// A block's stages one after the other, in the order of the sums.
template <typename Format>
struct StageWalk {
  int group;
  int end_group;
  int slice;

  __device__ __forceinline__ StageWalk(int first, int end)
      : group(first), end_group(end), slice(first) {}
  __device__ __forceinline__ bool done(int num_slices) const { return slice >= num_slices; }
  __device__ __forceinline__ void Advance(int num_slices) {
    slice += Format::kSumGroups;
    if (slice >= num_slices && group + 1 < end_group) slice = ++group;
  }
};

// Blocks of a cluster lie along x, tiles of rows of x along y, of rows of W along z.
template <typename Format, int kTiles, int kWarps>
__global__ void __launch_bounds__(TileShape<Format, kTiles, kWarps>::kThreads, 1)
    TileGemmKernel(const __grid_constant__ StreamGemmParams params, int num_stages) {
  using T = TileShape<Format, kTiles, kWarps>;
  using Sums = float[T::kWarpUnits][kTiles][4];
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_ranks = gridDim.x;
  const int own_parts = kSumParts / num_ranks;
  const int first_part = blockIdx.x * own_parts;
  const int first_token = blockIdx.y * T::kTokens;
  const int first_unit = blockIdx.z * T::kUnits;
  const int num_slices = (params.k + Format::kColumns - 1) / Format::kColumns;
  constexpr int kPartGroups = Format::kSumGroups / kSumParts;
  const int first_group = first_part * kPartGroups;
  const int end_group = first_group + own_parts * kPartGroups;

  typename Format::Source source = {};
  const bool requests = warp < T::kUnits && first_unit + warp < params.num_units;
  if (requests) {
    const GemmSegment& segment = params.segments[SegmentOf(params, first_unit + warp)];
    source = Format::FindSource(segment, first_unit + warp - segment.first_unit, params.k, lane);
  }
  const auto request_weights = [&](int slot, int slice) {
    if (!requests) return;
    Format::Request(source, 0, shared + slot * T::kStageBytes + warp * Format::kUnitBytes, slice,
                    params.k, lane);
  };
  // A thread copies one chunk of 16 bytes of every kRowStep-th row of x.
  constexpr int kChunks = Format::kColumns / 8;
  constexpr int kRowStep = T::kThreads / kChunks;
  static_assert(T::kTokens % kRowStep == 0 && kRowStep % 2 == 0);
  const int x_chunk = threadIdx.x % kChunks;
  const int x_row = threadIdx.x / kChunks;
  const int rows_left = params.m - first_token - x_row;
  const auto* x = Kept(static_cast<const __nv_bfloat16*>(params.x) +
                       (first_token + x_row) * params.x_stride + 8 * x_chunk);
  const int64_t x_step = Kept(kRowStep * params.x_stride);
  const uint32_t x_to = Kept(SharedAddress(shared) + T::kUnits * Format::kUnitBytes +
                             x_row * T::kRowBytes + 16 * SwizzledChunk(x_row, x_chunk));
  const auto request_x = [&](int slot, int slice) {
    const int column = slice * Format::kColumns;
    const bool in_row = column + 8 * x_chunk < params.k;
    const uint32_t to = x_to + slot * T::kStageBytes;
    const auto* from = x + column;
#pragma unroll
    for (int i = 0; i < T::kTokens / kRowStep; ++i) {
      CopyAsync16(to + i * (kRowStep * T::kRowBytes), from, in_row && i * kRowStep < rows_left);
      from += x_step;
    }
  };

  StageWalk<Format> next(first_group, end_group);
  for (int i = 0; i < num_stages - 1 && !next.done(num_slices); ++i) {
    request_weights(i, next.slice);
    next.Advance(num_slices);
  }
  WaitForEarlierKernels();
  StageWalk<Format> next_x(first_group, end_group);
  for (int i = 0; i < num_stages - 1; ++i) {
    if (!next_x.done(num_slices)) {
      request_x(i, next_x.slice);
      next_x.Advance(num_slices);
    }
    CommitCopies();
  }
  const int first_of_warp = warp / T::kTokenWarps * T::kWarpUnits;
  const int tokens_of_warp = warp % T::kTokenWarps * kTiles * 8;
  // Calls function(unit in the block, row of it, token in the block, sum).
  const auto for_each = [&](const Sums& sums, auto&& function) {
#pragma unroll
    for (int u = 0; u < T::kWarpUnits; ++u) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          function(first_of_warp + u, lane / 4 + 8 * (c / 2),
                   tokens_of_warp + 8 * n + 2 * (lane % 4) + c % 2, sums[u][n][c]);
        }
      }
    }
  };
  const auto add = [](Sums& to, const Sums& sums) {
#pragma unroll
    for (int u = 0; u < T::kWarpUnits; ++u) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) to[u][n][c] += sums[u][n][c];
      }
    }
  };
  auto* parts = reinterpret_cast<float*>(shared + num_stages * T::kStageBytes);
  Sums total = {};
  int slot = 0;
  int free_slot = num_stages - 1;
  for (int part = 0; part < own_parts; ++part) {
    Sums part_sums = {};
    for (int i = 0; i < kPartGroups; ++i) {
      Sums acc = {};
      for (int slice = first_group + part * kPartGroups + i; slice < num_slices;
           slice += Format::kSumGroups) {
        WaitForCopies(num_stages - 2);
        __syncthreads();
        if (!next.done(num_slices)) {
          request_weights(free_slot, next.slice);
          request_x(free_slot, next.slice);
          next.Advance(num_slices);
        }
        CommitCopies();
        const char* stage = shared + slot * T::kStageBytes;
        Format::template Multiply<kTiles, T::kWarpUnits>(
            stage + first_of_warp * Format::kUnitBytes, T::kWarpUnits,
            stage + T::kUnits * Format::kUnitBytes + tokens_of_warp * T::kRowBytes, kTiles * 8,
            lane, acc);
        free_slot = slot;
        slot = slot + 1 == num_stages ? 0 : slot + 1;
      }
      add(part_sums, acc);
    }
    if (num_ranks == 1) {
      add(total, part_sums);
    } else {
      float* to = parts + part * (T::kSumBytes / 4);
      for_each(part_sums, [&](int unit, int row, int token, float sum) {
        to[token * T::kSumStride + unit * kUnitRows + row] = sum;
      });
    }
  }

  if (num_ranks == 1) {
    for_each(total, [&](int unit, int row, int token, float sum) {
      if (first_unit + unit >= params.num_units || first_token + token >= params.m) return;
      StoreOutput<Format>(params, first_unit + unit, row, first_token + token, sum);
    });
    return;
  }
  StoreClusterSums<Format, kSumParts, T::kRows, T::kTokens, T::kSumStride>(
      params, first_unit, first_token, parts, kSumParts, own_parts);
}

template <typename Format, int kTiles, int kWarps>
void TileGemm(const StreamGemmParams& params, const StreamGemmDevice& device) {
  using T = TileShape<Format, kTiles, kWarps>;
  constexpr auto kKernel = TileGemmKernel<Format, kTiles, kWarps>;
  AllowSharedBytes<kKernel>(device.max_shared_bytes);
  const auto num_stages = [&](int num_parts) {
    return std::min((device.max_shared_bytes - num_parts * T::kSumBytes) / T::kStageBytes, 5);
  };
  const dim3 tiles(1, (params.m + T::kTokens - 1) / T::kTokens,
                   (params.num_units + T::kUnits - 1) / T::kUnits);
  int num_blocks = 1;
  if (device.has_clusters) {
    static const ClusterCounts max_clusters = [&] {
      ClusterCounts counts =
          MaxClusters(kKernel, T::kThreads, device.max_shared_bytes, device.num_sms);
      counts[3] = 0;  // each takes as many parts
      return counts;
    }();
    num_blocks = ClusterBlocks(static_cast<int>(tiles.y * tiles.z),
                               (params.k + Format::kColumns - 1) / Format::kColumns, max_clusters,
                               T::kMaxBlocks);
  }
  const int num_parts = num_blocks == 1 ? 0 : kSumParts / num_blocks;
  const int stages = num_stages(num_parts);
  LaunchKernel(kKernel,
               {.grid = dim3(num_blocks, tiles.y, tiles.z),
                .block = dim3(T::kThreads),
                .shared_bytes = static_cast<size_t>(stages * T::kStageBytes) +
                                static_cast<size_t>(num_parts) * T::kSumBytes,
                .cluster_blocks = num_blocks},
               device.stream, params, stages);
}

}  // namespace gloam::cuda
