// The streaming product: y = x W^T for few rows of x, limited by reading W once from memory.
//
// A thread block owns a contiguous range of units (16 rows of W) and walks it in chunks of up to
// kUnits. Its warps split the columns: warp w takes stages w, w + kWarps, ... of every chunk. Each
// warp keeps a ring of stages of its own in shared memory, filled by asynchronous copies that run
// ahead over the chunks' borders, so that reading never pauses; no barrier is needed but those of a
// chunk's reduction. Tensor cores multiply with W as the 16-row operand and eight rows of x as the
// other. The first stages of W are requested before the earlier kernel has finished: weights never
// change.
//
// Order of summation: within a warp by columns, then warps 0, 1, ... of each quarter of them, then
// the quarters: it depends on the number of columns and the format, never on the rows of x or of W.
//
// Bytes: those of W; of x, from L2, m * k * 2 for every chunk of every block.
#pragma once

#include <utility>

#include "kernels/cuda/gemm/common.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {

// How a launch cuts W and its shared memory.
struct StreamShape {
  int units_per_block = 0;
  int chunk_units = 0;  // at most
  int num_stages = 0;   // of a warp's ring, 2..kMaxStages
  int stage_bytes = 0;  // chunk_units of W, then the rows of x
};

// Units of the chunk that begins at `unit`: chunks end with a segment.
__device__ __forceinline__ int ChunkUnits(const StreamGemmParams& params, int unit, int end_unit,
                                          int chunk_units) {
  const int next = SegmentOf(params, unit) + 1;
  const int segment_end =
      next < params.num_segments ? params.segments[next].first_unit : params.num_units;
  return min(chunk_units, min(end_unit, segment_end) - unit);
}

// What a warp has still to request: the stages of its columns, chunk after chunk.
template <typename Format>
struct StageProducer {
  const StreamGemmParams& params;
  const StreamShape& shape;
  const int end_unit;
  const int own_slices;
  const int warp;
  const int lane;
  int chunk_unit;  // first unit of the current chunk
  int num_units = 0;
  int slice = 0;  // of this warp's
  typename Format::Source source = {};

  __device__ __forceinline__ StageProducer(const StreamGemmParams& p, const StreamShape& s,
                                           int first, int end, int own, int warp_index,
                                           int lane_index)
      : params(p),
        shape(s),
        end_unit(end),
        own_slices(own),
        warp(warp_index),
        lane(lane_index),
        chunk_unit(own > 0 ? first : end) {
    FindSource();
  }

  __device__ __forceinline__ bool done() const { return chunk_unit >= end_unit; }
  __device__ __forceinline__ int stage() const { return warp + slice * Format::kWarps; }

  __device__ __forceinline__ void FindSource() {
    if (done()) return;
    const GemmSegment& segment = params.segments[SegmentOf(params, chunk_unit)];
    source = Format::FindSource(segment, chunk_unit - segment.first_unit, params.k, lane);
    num_units = ChunkUnits(params, chunk_unit, end_unit, shape.chunk_units);
  }

  __device__ __forceinline__ void RequestWeights(char* stage_memory) const {
    for (int u = 0; u < num_units; ++u) {
      Format::Request(source, u, stage_memory + u * Format::kUnitBytes, stage(), params.k, lane);
    }
  }

  __device__ __forceinline__ void Advance() {
    if (++slice < own_slices) return;
    slice = 0;
    chunk_unit += num_units;
    FindSource();
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

// The x of a warp's first `num_stages` stages, which does not wait in line behind the weights that
// have been requested: the first products can begin when the first weights are there.
template <typename Format, int kTiles>
__device__ __forceinline__ void LoadFirstX(const StreamGemmParams& params, char* x_memory,
                                           int stage_bytes, int num_stages, int own_slices,
                                           int warp, int lane) {
  constexpr int kChunks = Format::kColumns / 8;
  // Eight loads in flight: many rows leave few stages.
  constexpr int kRowsAtOnce = kTiles == 1 ? 1 : 4;
  constexpr int kStagesAtOnce = 8 / kRowsAtOnce;
  const int count = params.m * kChunks;
  for (int begin = lane; begin < count; begin += 32 * kRowsAtOnce) {
    int slice = 0;
    for (int first = 0; first < num_stages; first += kStagesAtOnce) {
      uint4 values[kStagesAtOnce][kRowsAtOnce];
#pragma unroll
      for (int s = 0; s < kStagesAtOnce; ++s) {
        const int stage_column = (warp + slice * Format::kWarps) * Format::kColumns;
        slice = slice + 1 == own_slices ? 0 : slice + 1;
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) {
          const int i = begin + 32 * j;
          const int column = stage_column + 8 * (i % kChunks);
          values[s][j] = make_uint4(0, 0, 0, 0);
          if (first + s < num_stages && i < count && column < params.k) {
            values[s][j] =
                *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(params.x) +
                                                i / kChunks * params.x_stride + column);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kStagesAtOnce; ++s) {
#pragma unroll
        for (int j = 0; j < kRowsAtOnce; ++j) {
          const int i = begin + 32 * j;
          const int row = i / kChunks;
          if (first + s < num_stages && i < count) {
            *reinterpret_cast<uint4*>(x_memory + (first + s) * stage_bytes +
                                      row * (2 * Format::kColumns) +
                                      16 * SwizzledChunk(row, i % kChunks)) = values[s][j];
          }
        }
      }
    }
  }
}

// A chunk's sums go through shared memory a few units at a time; of up to eight rows of x by turns
// through two places, which saves a barrier. Set s of the sums of warp w is sum s * kWarps + w.
template <typename Format, int kTiles>
struct Reduction {
  static constexpr int kSets = Format::kSumGroups / Format::kWarps;  // of a warp
  static constexpr int kUnits = kTiles == 4 ? 1 : 2;
  static constexpr int kPlaces = kTiles == 1 ? 2 : 1;
  static constexpr int kRows = kUnits * kUnitRows;
  static constexpr int kRowStride = kRows + 4;  // of one row of x; keeps the writes off each other

  // Of one place.
  static __host__ __device__ constexpr int Floats(int m) {
    return Format::kSumGroups * m * kRowStride;
  }
  static constexpr int Bytes(int m) { return kPlaces * Floats(m) * 4; }
};

// Adds the warps' sums of `num_units` units from `unit` on, ascending, and stores the results.
// `acc` holds one set after the other.
template <typename Format, int kTiles, int kUnits>
__device__ __forceinline__ void ReduceAndStore(
    const StreamGemmParams& params,
    const float (&acc)[Reduction<Format, kTiles>::kSets * kUnits][kTiles][4], int unit,
    int num_units, float* sums, int& turn) {
  using R = Reduction<Format, kTiles>;
  static_assert(kUnits % R::kUnits == 0);
  const int lane = threadIdx.x % 32;
  const int warp_floats = params.m * R::kRowStride;
#pragma unroll
  for (int first = 0; first < kUnits; first += R::kUnits) {
    if (first >= num_units) break;
    if constexpr (R::kPlaces == 1) {
      __syncthreads();  // the last sums have been read
    }
    // With two places: who writes here has passed the barrier of the turn before, and who passed it
    // had read these.
    const float* all = sums + turn * R::Floats(params.m);
    float* own = sums + turn * R::Floats(params.m) + threadIdx.x / 32 * warp_floats;
    if constexpr (R::kPlaces == 2) turn ^= 1;
#pragma unroll
    for (int set = 0; set < R::kSets; ++set, own += Format::kWarps * warp_floats) {
#pragma unroll
      for (int u = 0; u < R::kUnits; ++u) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int token = 8 * n + 2 * (lane % 4) + c % 2;
            const int row = kUnitRows * u + lane / 4 + 8 * (c / 2);
            if (token < params.m) {
              own[token * R::kRowStride + row] = acc[set * kUnits + first + u][n][c];
            }
          }
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < params.m * R::kRows; i += Format::kWarps * 32) {
      const int token = i / R::kRows;
      const int row = i % R::kRows;
      if (first + row / kUnitRows >= num_units) continue;
      constexpr int kPartSums = Format::kSumGroups / kSumParts;
      float value = 0;
#pragma unroll
      for (int part = 0; part < kSumParts; ++part) {
        float sum = 0;
#pragma unroll
        for (int w = part * kPartSums; w < (part + 1) * kPartSums; ++w) {
          sum += all[w * warp_floats + token * R::kRowStride + row];
        }
        value += sum;
      }
      StoreOutput<Format>(params, unit + first + row / kUnitRows, row % kUnitRows, token, value);
    }
  }
}

template <typename Format, int kTiles, int kUnits>
__global__ void __launch_bounds__(Format::kWarps * 32)
    StreamGemmKernel(const __grid_constant__ StreamGemmParams params,
                     const __grid_constant__ StreamShape shape) {
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // known to be the warp's
  const int lane = threadIdx.x % 32;
  const int first_unit = blockIdx.x * shape.units_per_block;
  const int end_unit = min(first_unit + shape.units_per_block, params.num_units);
  const int num_slices = (params.k + Format::kColumns - 1) / Format::kColumns;
  const int own_slices = max((num_slices - warp + Format::kWarps - 1) / Format::kWarps, 0);
  const int x_offset = shape.chunk_units * Format::kUnitBytes;
  char* ring = shared + warp * shape.num_stages * shape.stage_bytes;
  auto* sums =
      reinterpret_cast<float*>(shared + Format::kWarps * shape.num_stages * shape.stage_bytes);

  StageProducer<Format> producer(params, shape, first_unit, end_unit, own_slices, warp, lane);
  int num_requested = 0;
  for (int i = 0; i < shape.num_stages - 1; ++i) {
    if (!producer.done()) {
      producer.RequestWeights(ring + i * shape.stage_bytes);
      producer.Advance();
      ++num_requested;
    }
    CommitCopies();
  }
  WaitForEarlierKernels();
  LoadFirstX<Format, kTiles>(params, ring + x_offset, shape.stage_bytes, num_requested, own_slices,
                             warp, lane);

  int turn = 0;
  int slot = 0;
  int free_slot = shape.num_stages - 1;  // the one that was read last
  for (int unit = first_unit; unit < end_unit;) {
    const int num_units = ChunkUnits(params, unit, end_unit, shape.chunk_units);
    float acc[kUnits][kTiles][4] = {};
    for (int i = 0; i < own_slices; ++i) {
      WaitForCopies(shape.num_stages - 2);
      __syncwarp();
      const char* stage = ring + slot * shape.stage_bytes;
      Format::template Multiply<kTiles, kUnits>(stage, num_units, stage + x_offset, params.m, lane,
                                                acc);
      if (!producer.done()) {
        char* memory = ring + free_slot * shape.stage_bytes;
        producer.RequestWeights(memory);
        RequestX<Format>(params, memory + x_offset, producer.stage(), lane);
        producer.Advance();
      }
      CommitCopies();
      free_slot = slot;
      slot = slot + 1 == shape.num_stages ? 0 : slot + 1;
    }
    ReduceAndStore<Format, kTiles, kUnits>(params, acc, unit, num_units, sums, turn);
    unit += num_units;
  }
}

// For `m` rows of x. One block takes an SM, so that the blocks spread evenly; the next product's
// takes over each SM as soon as it is left.
template <typename Format, int kTiles, int kUnits>
StreamShape ShapeOf(int m, int num_units, const StreamGemmDevice& device) {
  constexpr int kGoodStages = 3;  // with two, a warp's loads wait for its products
  StreamShape shape;
  shape.units_per_block = (num_units + device.num_sms - 1) / device.num_sms;
  const auto fit = [&](int units) {
    shape.chunk_units = units;
    shape.stage_bytes = (units * Format::kUnitBytes + m * Format::kColumns * 2 + 127) / 128 * 128;
    shape.num_stages = (device.max_shared_bytes - Reduction<Format, kTiles>::Bytes(m)) /
                       (Format::kWarps * shape.stage_bytes);
    if (shape.num_stages > kMaxStages) shape.num_stages = kMaxStages;
  };
  int units = shape.units_per_block < kUnits ? shape.units_per_block : kUnits;
  for (fit(units); units > 1 && shape.num_stages < kGoodStages;) fit(--units);
  const int num_chunks = (shape.units_per_block + units - 1) / units;
  fit((shape.units_per_block + num_chunks - 1) / num_chunks);
  return shape;
}

template <typename Format, int kTiles, int kUnits>
void LaunchStreamGemm(const StreamGemmParams& params, const StreamGemmDevice& device) {
  constexpr auto kKernel = StreamGemmKernel<Format, kTiles, kUnits>;
  AllowSharedBytes<kKernel>(device.max_shared_bytes);
  const StreamShape shape = ShapeOf<Format, kTiles, kUnits>(params.m, params.num_units, device);
  const size_t shared_bytes =
      static_cast<size_t>(Format::kWarps) * shape.num_stages * shape.stage_bytes +
      Reduction<Format, kTiles>::Bytes(params.m);
  const int grid = (params.num_units + shape.units_per_block - 1) / shape.units_per_block;
  LaunchKernel(
      kKernel,
      {.grid = dim3(grid), .block = dim3(Format::kWarps * 32), .shared_bytes = shared_bytes},
      device.stream, params, shape);
}

// Rows of x that one launch takes, at most 8 * kMaxTiles: a ring needs two stages.
template <typename Format, int kMaxTiles>
int MaxRows(const StreamGemmDevice& device) {
  if constexpr (kMaxTiles >= 4) {
    if (ShapeOf<Format, 4, 4>(32, 1, device).num_stages >= 2) return 32;
  }
  if (ShapeOf<Format, 2, 4>(16, 1, device).num_stages >= 2) return 16;
  int rows = 8;
  while (rows > 1 && ShapeOf<Format, 1, 4>(rows, 1, device).num_stages < 2) --rows;
  return rows;
}

// Calls function(params) for at most `max_rows` rows of x after the other.
template <typename Function>
void ForRows(const StreamGemmParams& all, int max_rows, Function&& function) {
  StreamGemmParams params = all;
  for (int row = 0; row < all.m; row += max_rows) {
    params.m = all.m - row < max_rows ? all.m - row : max_rows;
    params.x = static_cast<const __nv_bfloat16*>(all.x) + row * all.x_stride;
    for (int i = 0; i < all.num_segments; ++i) {
      const GemmSegment& segment = all.segments[i];
      params.segments[i].y =
          static_cast<char*>(segment.y) + row * segment.y_stride * (segment.y_is_bf16 ? 2 : 4);
    }
    function(std::as_const(params));
  }
}

template <typename Format, int kMaxTiles>
void StreamGemm(const StreamGemmParams& all, const StreamGemmDevice& device) {
  ForRows(all, MaxRows<Format, kMaxTiles>(device), [&](const StreamGemmParams& params) {
    if (params.m <= 8) {
      LaunchStreamGemm<Format, 1, Format::kMaxUnits>(params, device);
    } else if (params.m <= 16) {
      LaunchStreamGemm<Format, 2, Format::kMaxUnits>(params, device);
    } else if constexpr (kMaxTiles >= 4) {
      LaunchStreamGemm<Format, 4, 4>(params, device);
    }
  });
}

}  // namespace gloam::cuda
