// The tiled product: y = x W^T for many rows of x, with exactly the sums of the streaming product
// (gemm_stream.cuh) and so the same bits: a row's result does not depend on how many rows a step
// has. A block makes a tile of 128 rows of W by 128 rows of x (64 where a format's scales need the
// registers): 2 x 4 warps, each 64 x 32. It walks the columns in the streaming product's order: the
// stages of its warp 0, then of warp 1, ..., and adds each warp's sum to the total.
//
// FLOPs: 2 m n k, by mma.sync, which reaches about 60 % of what Hopper's wgmma does.
#pragma once

#include "kernels/cuda/gemm_common.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {

template <typename Format, int kTiles>
struct TileShape {
  static constexpr int kWarpUnits = 4;
  static constexpr int kRowWarps = 2;
  static constexpr int kTokenWarps = 4;
  static constexpr int kThreads = kRowWarps * kTokenWarps * 32;
  static constexpr int kUnits = kRowWarps * kWarpUnits;
  static constexpr int kTokens = kTokenWarps * kTiles * 8;
  static constexpr int kRowBytes = Format::kColumns * 2;  // of x
  static constexpr int kStageBytes = kUnits * Format::kUnitBytes + kTokens * kRowBytes;
  static_assert(kUnits == kThreads / 32);  // each warp requests one
};

template <typename Format, int kTiles>
__global__ void __launch_bounds__(TileShape<Format, kTiles>::kThreads, 1)
    TileGemmKernel(const __grid_constant__ StreamGemmParams params, int num_stages) {
  using T = TileShape<Format, kTiles>;
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_token = blockIdx.x * T::kTokens;
  const int first_unit = blockIdx.y * T::kUnits;
  const int num_slices = (params.k + Format::kColumns - 1) / Format::kColumns;

  typename Format::Source source = {};
  if (first_unit + warp < params.num_units) {
    const GemmSegment& segment = params.segments[SegmentOf(params, first_unit + warp)];
    source = Format::FindSource(segment, first_unit + warp - segment.first_unit, params.k, lane);
  }
  const auto request_x = [&](char* memory, int slice) {
    constexpr int kChunks = Format::kColumns / 8;
#pragma unroll
    for (int i = threadIdx.x; i < T::kTokens * kChunks; i += T::kThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const int column = slice * Format::kColumns + 8 * chunk;
      const bool valid = column < params.k && first_token + row < params.m;
      const auto* x = static_cast<const __nv_bfloat16*>(params.x);
      if (valid) x += (first_token + row) * params.x_stride + column;
      CopyAsync16(SharedAddress(memory) + row * T::kRowBytes + 16 * SwizzledChunk(row, chunk), x,
                  valid);
    }
  };
  // The next stage to request, in the order of the sums.
  int next_group = 0;
  int next_slice = 0;
  const auto request = [&](int slot) {
    if (next_slice < num_slices) {
      char* memory = shared + slot * T::kStageBytes;
      if (first_unit + warp < params.num_units) {
        Format::Request(source, 0, memory + warp * Format::kUnitBytes, next_slice, params.k, lane);
      }
      request_x(memory + T::kUnits * Format::kUnitBytes, next_slice);
      next_slice += Format::kWarps;
      if (next_slice >= num_slices && next_group + 1 < Format::kWarps) next_slice = ++next_group;
    }
    CommitCopies();
  };

  WaitForEarlierKernels();
  for (int i = 0; i < num_stages - 1; ++i) request(i);
  const int first_of_warp = warp / T::kTokenWarps * T::kWarpUnits;
  const int tokens_of_warp = warp % T::kTokenWarps * kTiles * 8;
  float total[T::kWarpUnits][kTiles][4] = {};
  int slot = 0;
  int free_slot = num_stages - 1;
  for (int group = 0; group < Format::kWarps; ++group) {
    float acc[T::kWarpUnits][kTiles][4] = {};
    for (int slice = group; slice < num_slices; slice += Format::kWarps) {
      WaitForCopies(num_stages - 2);
      __syncthreads();
      request(free_slot);
      const char* stage = shared + slot * T::kStageBytes;
      Format::template Multiply<kTiles, T::kWarpUnits>(
          stage + first_of_warp * Format::kUnitBytes, T::kWarpUnits,
          stage + T::kUnits * Format::kUnitBytes + tokens_of_warp * T::kRowBytes, kTiles * 8, lane,
          acc);
      free_slot = slot;
      slot = slot + 1 == num_stages ? 0 : slot + 1;
    }
#pragma unroll
    for (int u = 0; u < T::kWarpUnits; ++u) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) total[u][n][c] += acc[u][n][c];
      }
    }
  }

#pragma unroll
  for (int u = 0; u < T::kWarpUnits; ++u) {
    const int unit = first_unit + first_of_warp + u;
    if (unit >= params.num_units) break;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = first_token + tokens_of_warp + 8 * n + 2 * (lane % 4) + c % 2;
        if (token < params.m) {
          StoreOutput<Format>(params, unit, lane / 4 + 8 * (c / 2), token, total[u][n][c]);
        }
      }
    }
  }
}

template <typename Format, int kTiles>
void TileGemm(const StreamGemmParams& params, const StreamGemmDevice& device) {
  using T = TileShape<Format, kTiles>;
  constexpr auto kKernel = TileGemmKernel<Format, kTiles>;
  AllowSharedBytes<kKernel>(device.max_shared_bytes);
  int num_stages = device.max_shared_bytes / T::kStageBytes;
  if (num_stages > 5) num_stages = 5;
  const dim3 grid((params.m + T::kTokens - 1) / T::kTokens,
                  (params.num_units + T::kUnits - 1) / T::kUnits);
  LaunchKernel(kKernel,
               {.grid = grid,
                .block = dim3(T::kThreads),
                .shared_bytes = static_cast<size_t>(num_stages) * T::kStageBytes},
               device.stream, params, num_stages);
}

}  // namespace gloam::cuda
