// The product of a step of medium size with quantised weights: y = x W^T for 17 to a few hundred
// rows of x. A block walks the columns, or a part of them, of a tile of 256 rows of W by 8 * kTiles
// of x, so that a weight is unpacked once for all of these rows of x; where the tiles are too few
// for the device, the blocks of a cluster share the columns of one and add their sums in order, out
// of each other's shared memory.
//
// Bytes: those of W, per 8 * kTiles rows of x; of x, from L2, m * k * 2 for every tile of rows of
// W. FLOPs: 2 m n k, by mma.sync.
#include <algorithm>

#include "kernels/cuda/gemm/cluster_sums.cuh"
#include "kernels/cuda/gemm/packed_weight.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockUnits = kWarps;  // one a warp
constexpr int kBlockRows = kBlockUnits * kUnitRows;
constexpr int kXRowBytes = kStageColumns * 2;
constexpr int kSumStride = kBlockRows + 4;  // keeps the writes of a warp off each other

struct ClusterFormat {
  static constexpr bool kHasRowScales = false;
  static constexpr float kSumScale = 1;
};

template <WeightType kType, int kTiles>
constexpr int StageBytes() {
  return kBlockUnits * PackedStage<kType>::kBytes + 8 * kTiles * kXRowBytes;
}

// One pair of runs of a warp's unit.
template <WeightType kType>
struct UnitTile {
  uint32_t a[2][2][4];
  RunScale scales[2][2];

  __device__ __forceinline__ UnitTile(const char* unit, int pair, int lane) {
    UnpackRunPairExactly<kType>(unit, pair, lane, a);
    const PairScales<kType> pair_scales(unit, pair, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) scales[r][hi] = pair_scales.Get(r, hi);
    }
  }
};

// acc += a pair of runs by eight rows of x, of which this lane holds `b`.
template <WeightType kType>
__device__ __forceinline__ void MultiplyTile(const UnitTile<kType>& w, const uint4 (&b)[2],
                                             float (&acc)[4]) {
  using P = PackedStage<kType>;
  constexpr uint32_t kMinusOnes = 0xbf80bf80;  // bf16
  float x_sums[2][4] = {};
  if constexpr (P::kHasMin) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      MultiplyAdd(x_sums[r], kMinusOnes, kMinusOnes, kMinusOnes, kMinusOnes, b[r].x, b[r].y);
      MultiplyAdd(x_sums[r], kMinusOnes, kMinusOnes, kMinusOnes, kMinusOnes, b[r].z, b[r].w);
    }
  }
  float part[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t(&low)[4] = w.a[r][0];
      const uint32_t(&high)[4] = w.a[r][1];
      MultiplyAdd(part[r], low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1],
                  half == 0 ? b[r].x : b[r].z, half == 0 ? b[r].y : b[r].w);
    }
    if (half == 0 && !P::kHalves) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RunScale& low = w.scales[r][0];
      const RunScale& high = w.scales[r][1];
      AddScaled(part[r], low.s[half], high.s[half], acc);
      if constexpr (P::kHasMin) AddScaled(x_sums[r], low.m, high.m, acc);
      if constexpr (P::kHalves) {
#pragma unroll
        for (float& p : part[r]) p = 0;
      }
    }
  }
}

// What lane 4g + t multiplies of run `run` of row `row` of x in shared memory.
template <WeightType kType>
__device__ __forceinline__ uint4 LoadX(const char* x, int row, int run, int t) {
  const char* data = x + row * kXRowBytes + (run ^ (row & 1)) * (kRunElements * 2);
  if constexpr (PackedStage<kType>::kHalves) {
    const uint2 first = reinterpret_cast<const uint2*>(data)[t];
    const uint2 second = reinterpret_cast<const uint2*>(data)[4 + t];
    return make_uint4(first.x, first.y, second.x, second.y);
  }
  return reinterpret_cast<const uint4*>(data)[t];
}

// Blocks of a cluster lie along x, tiles of rows of x along y, of rows of W along z.
template <WeightType kType, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    ClusterGemmKernel(const __grid_constant__ StreamGemmParams params, int num_stages) {
  constexpr int kTokens = 8 * kTiles;
  constexpr int kUnitBytes = PackedStage<kType>::kBytes;
  constexpr int kStageBytes = StageBytes<kType, kTiles>();
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // known to be the warp's
  const int lane = threadIdx.x % 32;
  const int rank = blockIdx.x;
  const int num_ranks = gridDim.x;
  const int first_token = blockIdx.y * kTokens;
  const int first_unit = blockIdx.z * kBlockUnits;
  const int num_slices = static_cast<int>(NumStages(params.k));
  const int own_slices = max((num_slices - rank + num_ranks - 1) / num_ranks, 0);

  // Past the last unit a warp computes what nobody stores.
  PanelSource<kUnitBytes> source;
  const int own_unit = min(first_unit + warp, params.num_units - 1);
  const GemmSegment& segment = params.segments[SegmentOf(params, own_unit)];
  source.Find(segment, own_unit - segment.first_unit, rank, params.k, lane);
  // Of the next stage each time.
  const auto request_weights = [&](int slot) {
    char* memory = shared + slot * kStageBytes + warp * kUnitBytes;
    source.Request(SharedAddress(memory) + 16 * lane, lane);
    source.MoveStages(num_ranks);
  };
  constexpr int kChunks = kStageColumns / 8;
  const int x_chunk = threadIdx.x % kChunks;
  const int x_row = threadIdx.x / kChunks;
  const auto* x = static_cast<const __nv_bfloat16*>(params.x) +
                  (first_token + x_row) * params.x_stride + 8 * x_chunk;
  const auto request_x = [&](int slot, int slice) {
    const int column = (rank + slice * num_ranks) * kStageColumns;
    const uint32_t to = SharedAddress(shared + slot * kStageBytes + kBlockUnits * kUnitBytes) +
                        x_row * kXRowBytes + 16 * SwizzledChunk(x_row, x_chunk);
#pragma unroll
    for (int row = 0; row < kTokens; row += kThreads / kChunks) {
      const bool valid = column + 8 * x_chunk < params.k && first_token + x_row + row < params.m;
      CopyAsync16(to + row * kXRowBytes, valid ? x + column + row * params.x_stride : x, valid);
    }
  };

  for (int i = 0; i < num_stages - 1 && i < own_slices; ++i) request_weights(i);
  WaitForEarlierKernels();
  for (int i = 0; i < num_stages - 1; ++i) {
    if (i < own_slices) request_x(i, i);
    CommitCopies();
  }
  float acc[kTiles][4] = {};
  int slot = 0;
  int free_slot = num_stages - 1;
#pragma unroll 1
  for (int slice = 0; slice < own_slices; ++slice) {
    WaitForCopies(num_stages - 2);
    __syncthreads();
    if (slice + num_stages - 1 < own_slices) {
      request_weights(free_slot);
      request_x(free_slot, slice + num_stages - 1);
    }
    CommitCopies();
    const char* stage = shared + slot * kStageBytes;
    const char* stage_x = stage + kBlockUnits * kUnitBytes;
#pragma unroll
    for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
      const UnitTile<kType> w(stage + warp * kUnitBytes, pair, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int row = 8 * n + lane / 4;
        const uint4 b[2] = {LoadX<kType>(stage_x, row, 2 * pair, lane % 4),
                            LoadX<kType>(stage_x, row, 2 * pair + 1, lane % 4)};
        MultiplyTile(w, b, acc[n]);
      }
    }
    free_slot = slot;
    slot = slot + 1 == num_stages ? 0 : slot + 1;
  }

  __syncthreads();  // the stages have been read
  auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = 8 * n + 2 * (lane % 4) + c % 2;
      const int row = warp * kUnitRows + lane / 4 + 8 * (c / 2);
      sums[token * kSumStride + row] = acc[n][c];
    }
  }
  StoreClusterSums<ClusterFormat, kMaxClusterBlocks, kBlockRows, kTokens, kSumStride>(
      params, first_unit, first_token, sums, num_ranks, 1);
}

template <WeightType kType, int kTiles>
void Launch(const StreamGemmParams& params, const StreamGemmDevice& device) {
  constexpr int kMaxRing = 5;
  constexpr int kSumBytes = 8 * kTiles * kSumStride * 4;
  constexpr int kStageBytes = StageBytes<kType, kTiles>();
  const auto kernel = ClusterGemmKernel<kType, kTiles>;
  const int num_stages = std::min(device.max_shared_bytes / kStageBytes, kMaxRing);
  const int shared_bytes = std::max(num_stages * kStageBytes, kSumBytes);
  static const auto max_clusters = [&] {
    GLOAM_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          device.max_shared_bytes));
    return MaxClusters(kernel, kThreads, shared_bytes, device.num_sms);
  }();
  const int token_tiles = (params.m + 8 * kTiles - 1) / (8 * kTiles);
  const int row_tiles = (params.num_units + kBlockUnits - 1) / kBlockUnits;
  const int cluster_blocks =
      ClusterBlocks(token_tiles * row_tiles, static_cast<int>(NumStages(params.k)), max_clusters);
  LaunchKernel(kernel,
               {.grid = dim3(cluster_blocks, token_tiles, row_tiles),
                .block = dim3(kThreads),
                .shared_bytes = static_cast<size_t>(shared_bytes),
                .cluster_blocks = cluster_blocks},
               device.stream, params, num_stages);
}

template <WeightType kType>
void Multiply(const StreamGemmParams& params, const StreamGemmDevice& device) {
  if (params.m <= 32) {
    Launch<kType, 4>(params, device);
  } else {
    Launch<kType, 8>(params, device);
  }
}

}  // namespace

void ClusterGemmQuantized(WeightType type, const StreamGemmParams& params,
                          const StreamGemmDevice& device) {
  DispatchQuantized(type, [&]<WeightType kType>() { Multiply<kType>(params, device); });
}

}  // namespace gloam::cuda
