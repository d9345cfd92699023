// The streaming product with GGUF weights, which stay packed until they are in registers: the
// integers become bf16 exactly, the products of each run are summed in fp32 and scaled there.
//
// As in stream.cuh a block walks chunks of units and its warps split the columns. What differs
// is for the sake of fewer instructions: a warp's ring holds single units, however many a chunk
// has, and each warp loads its x into registers, a stage ahead.
#include <algorithm>
#include <utility>

#include "kernels/cuda/gemm/packed_weight.cuh"
#include "kernels/cuda/gemm/stream.cuh"
#include "kernels/cuda/gemm/tile.cuh"

namespace gloam::cuda {
namespace {

// A warp with several sums of an element adds its stages' products to them by turns: they are those
// of as many warps.
template <WeightType kType, int kNumWarps, int kNumSums = kNumWarps>
struct QuantizedFormat {
  using P = PackedStage<kType>;
  static constexpr int kWarps = kNumWarps;
  static constexpr int kSumGroups = kNumSums;
  static constexpr int kMaxUnits = 4;  // of a chunk
  static constexpr int kColumns = kStageColumns;
  static constexpr int kUnitBytes = P::kBytes;
  static constexpr bool kHasRowScales = false;
  // Integers are 2^-133 of themselves (UnpackRunPair), x is multiplied by 2^64: far from the ends
  // of bf16 and fp32.
  static constexpr float kSumScale = 0x1p69;
  static constexpr int kSums = P::kHalves ? 2 : 1;  // of a run

  using Source = PanelSource<kUnitBytes>;
  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int lane) {
    Source source;
    source.Find(segment, unit, 0, k, lane);
    return source;
  }
  static __device__ __forceinline__ void Request(Source source, int, char* to, int stage, int,
                                                 int lane) {
    source.MoveStages(stage);
    source.Request(SharedAddress(to) + 16 * lane, lane);
  }

  // The offset of the integers, negated, as such an integer twice; where there is a min, one.
  static constexpr uint32_t MinusOffset(int factor) {
    const uint32_t half = 0x8000 | (P::kHasMin ? 1 : P::kTraits.offset) * factor;
    return half << 16 | half;
  }

  // Where in a run of x the columns of lane 4g + t begin.
  static __device__ __forceinline__ int OffsetInRun(int t) { return (P::kHalves ? 8 : 16) * t; }
  static __device__ __forceinline__ uint4 LoadRun(const char* x) {
    if constexpr (P::kHalves) {
      const uint2 first = *reinterpret_cast<const uint2*>(x);
      const uint2 second = *reinterpret_cast<const uint2*>(x + kRunElements);
      return make_uint4(first.x, first.y, second.x, second.y);
    }
    return *reinterpret_cast<const uint4*>(x);
  }

  // The x of a pair of runs and of eight rows, ready to be multiplied by integers.
  struct XTile {
    uint4 b[2];
    float sums[2][kSums][4] = {};  // of each run's x, times what MinusOffset() says
    float zeros[4] = {};

    __device__ __forceinline__ XTile(const uint4& first, const uint4& second) {
      constexpr uint32_t k2To64 = 0x5f805f80;
      constexpr uint32_t kOdd = P::kOddFactor == 16 ? 0x5d805d80 : k2To64;  // 2^60
      constexpr uint32_t kEvenOffset = MinusOffset(1), kOddOffset = MinusOffset(P::kOddFactor);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& values = r == 0 ? first : second;
        b[r] = make_uint4(MultiplyBF16x2(values.x, k2To64), MultiplyBF16x2(values.y, kOdd),
                          MultiplyBF16x2(values.z, k2To64), MultiplyBF16x2(values.w, kOdd));
        MultiplyAdd(sums[r][0], kEvenOffset, kEvenOffset, kOddOffset, kOddOffset, b[r].x, b[r].y);
        MultiplyAdd(sums[r][kSums - 1], kEvenOffset, kEvenOffset, kOddOffset, kOddOffset, b[r].z,
                    b[r].w);
      }
    }

    // What the products of a run, or its half, are added to.
    __device__ __forceinline__ const float (&Start(int r, int half) const)[4] {
      return P::kHasMin ? zeros : sums[r][P::kHalves ? half : 0];
    }
  };

  // One pair of runs of a few units.
  template <int kCount>
  struct UnitTile {
    uint32_t a[kCount][2][2][4];
    RunScale scales[kCount][2][2];

    __device__ __forceinline__ UnitTile(const char* const* units, int pair, int lane) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        UnpackRunPair<kType>(units[u], pair, lane, a[u]);
        const PairScales<kType> pair_scales(units[u], pair, lane);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int hi = 0; hi < 2; ++hi) scales[u][r][hi] = pair_scales.Get(r, hi);
        }
      }
    }
  };

  // A stage of units that lie one after the other, by 8 * kTiles rows of x in shared memory.
  template <int kTiles, int kUnits>
  static __device__ __forceinline__ void Multiply(const char* units, int, const char* x, int,
                                                  int lane, float (&acc)[kUnits][kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
#pragma unroll
      for (int first = 0; first < kUnits; first += 2) {
        const char* const memory[2] = {units + first * kUnitBytes,
                                       units + (first + 1) * kUnitBytes};
        const UnitTile<2> w(memory, pair, lane);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int row = 8 * n + lane / 4;
          const auto load = [&](int r) {
            const int run = (2 * pair + r) ^ (row & 1);  // see SwizzledChunk
            return LoadRun(x + row * (kColumns * 2) + run * (kRunElements * 2) +
                           OffsetInRun(lane % 4));
          };
          MultiplyTile(w, XTile(load(0), load(1)), n, acc + first);
        }
      }
    }
  }

  // The products of a run wait for each other: those of other runs and units stand between.
  template <int kCount, int kTiles>
  static __device__ __forceinline__ void MultiplyTile(const UnitTile<kCount>& w, const XTile& x,
                                                      int n, float (*acc)[kTiles][4]) {
    float part[kCount][2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t(&low)[4] = w.a[u][r][0];
          const uint32_t(&high)[4] = w.a[u][r][1];
          const bool begins = half == 0 || P::kHalves;
          MultiplyAdd(part[u][r], begins ? x.Start(r, half) : std::as_const(part[u][r]),
                      low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1],
                      half == 0 ? x.b[r].x : x.b[r].z, half == 0 ? x.b[r].y : x.b[r].w);
        }
      }
      if (half == 0 && !P::kHalves) continue;
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const RunScale& low = w.scales[u][r][0];
          const RunScale& high = w.scales[u][r][1];
          AddScaled(part[u][r], low.s[half], high.s[half], acc[u][n]);
          if constexpr (P::kHasMin) AddScaled(x.sums[r][0], low.m, high.m, acc[u][n]);
        }
      }
    }
  }
};

// What a warp has still to request: of every chunk the stages of its columns, of each stage the
// units.
template <typename Format>
struct UnitProducer {
  const StreamGemmParams& params;
  const int chunk_units;
  const int end_unit;
  const int own_slices;
  const int warp;
  const int lane;
  int chunk_unit;  // first unit of the current chunk
  int num_units = 0;
  int slice = 0;  // of this warp's
  int unit = 0;   // of the chunk's
  typename Format::Source source = {};

  __device__ __forceinline__ UnitProducer(const StreamGemmParams& p, int max_units, int first,
                                          int end, int own, int warp_index, int lane_index)
      : params(p),
        chunk_units(max_units),
        end_unit(end),
        own_slices(own),
        warp(warp_index),
        lane(lane_index),
        chunk_unit(own > 0 ? first : end) {
    FindSource();
  }

  __device__ __forceinline__ void FindSource() {
    if (chunk_unit >= end_unit) return;
    const GemmSegment& segment = params.segments[SegmentOf(params, chunk_unit)];
    source.Find(segment, chunk_unit - segment.first_unit, warp, params.k, lane);
    num_units = ChunkUnits(params, chunk_unit, end_unit, chunk_units);
  }

  // Closes a group of copies in any case. `to`: where this lane's first 16 bytes go.
  __device__ __forceinline__ void Request(uint32_t to) {
    if (chunk_unit < end_unit) {
      source.Request(to, lane);
      source.MoveUnits(1);
      if (++unit == num_units) {
        unit = 0;
        source.MoveUnits(-num_units);
        source.MoveStages(Format::kWarps);
        if (++slice == own_slices) {
          slice = 0;
          chunk_unit += num_units;
          FindSource();
        }
      }
    }
    CommitCopies();
  }
};

// A warp's x: this lane's columns of eight rows a tile.
template <typename Format, int kTiles>
struct XReader {
  const char* rows[kTiles];

  __device__ __forceinline__ XReader(const StreamGemmParams& params, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      // Rows past the last multiply into columns of the result that nobody stores.
      const int row = min(8 * n + lane / 4, params.m - 1);
      const auto* x = static_cast<const __nv_bfloat16*>(params.x) + row * params.x_stride;
      rows[n] = Kept(reinterpret_cast<const char*>(x + warp * Format::kColumns) +
                     Format::OffsetInRun(lane % 4));
    }
  }

  // The warp's slice `slice`, of which `columns` exist: what multiplies the zeros behind them is
  // any number.
  __device__ __forceinline__ void Load(int slice, int columns,
                                       uint4 (&runs)[kRunsPerStage][kTiles]) const {
    const int64_t offset = int64_t{slice} * (Format::kWarps * Format::kColumns * 2);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const char* stage = rows[n] + offset;
#pragma unroll
      for (int run = 0; run < kRunsPerStage; ++run) {
        const bool exists = run == 0 || run * kRunElements < columns;
        runs[run][n] = Format::LoadRun(stage + (exists ? run * (kRunElements * 2) : 0));
      }
    }
  }
};

struct QuantizedShape {
  int units_per_block = 0;
  int chunk_units = 0;  // at most
  int num_slots = 0;    // of a warp's ring, each of a unit
};
constexpr int kMaxSlots = 12;

template <typename Format, int kTiles>
__global__ void __launch_bounds__(Format::kWarps * 32)
    QuantizedStreamKernel(const __grid_constant__ StreamGemmParams params,
                          const __grid_constant__ QuantizedShape shape) {
  constexpr int kUnits = Format::kMaxUnits;
  constexpr int kUnitBytes = Format::kUnitBytes;
  extern __shared__ __align__(128) char shared[];
  AllowNextKernel();
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // known to be the warp's
  const int lane = Kept(static_cast<int>(threadIdx.x % 32));
  const int first_unit = blockIdx.x * shape.units_per_block;
  const int end_unit = min(first_unit + shape.units_per_block, params.num_units);
  const int num_slices = (params.k + Format::kColumns - 1) / Format::kColumns;
  const int own_slices = max((num_slices - warp + Format::kWarps - 1) / Format::kWarps, 0);
  const int num_slots = shape.num_slots;
  const uint32_t ring = Kept(SharedAddress(shared) + warp * num_slots * kUnitBytes);
  auto* sums = reinterpret_cast<float*>(shared + Format::kWarps * num_slots * kUnitBytes);

  UnitProducer<Format> producer(params, shape.chunk_units, first_unit, end_unit, own_slices, warp,
                                lane);
#pragma unroll 1
  for (int i = 0; i < num_slots; ++i) producer.Request(ring + i * kUnitBytes + 16 * lane);
  const XReader<Format, kTiles> reader(params, warp, lane);
  const int columns = params.k - warp * Format::kColumns;  // from the warp's first on
  WaitForEarlierKernels();
  uint4 next_x[kRunsPerStage][kTiles];
  if (own_slices > 0) reader.Load(0, columns, next_x);

  int turn = 0;
  int slot = 0;
  for (int unit = first_unit; unit < end_unit;) {
    const int num_units = ChunkUnits(params, unit, end_unit, shape.chunk_units);
    constexpr int kSets = Reduction<Format, kTiles>::kSets;
    float acc[kSets * kUnits][kTiles][4] = {};
    const auto multiply_slice = [&](int i, auto* set_acc) {
      uint4 x[kRunsPerStage][kTiles];
      memcpy(x, next_x, sizeof(x));
      const int next = i + 1 < own_slices ? i + 1 : 0;
      reader.Load(next, columns - next * (Format::kWarps * Format::kColumns), next_x);
      WaitForCopies(num_slots - num_units);
      __syncwarp();
      const char* units[kUnits];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int at = slot + u < num_slots ? slot + u : slot + u - num_slots;
        units[u] = SharedPointer(ring + at * kUnitBytes);
      }
#pragma unroll
      for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
        using XTile = typename Format::XTile;
        const XTile first_tile(x[2 * pair][0], x[2 * pair + 1][0]);
        const XTile last_tile(x[2 * pair][kTiles - 1], x[2 * pair + 1][kTiles - 1]);
        const auto multiply = [&](const auto& w, auto* unit_acc) {
          Format::MultiplyTile(w, first_tile, 0, unit_acc);
          if constexpr (kTiles == 2) Format::MultiplyTile(w, last_tile, 1, unit_acc);
        };
#pragma unroll
        for (int u = 0; u < kUnits; u += 2) {
          if (u >= num_units) break;
          if (u + 1 < num_units) {
            multiply(typename Format::template UnitTile<2>(units + u, pair, lane), set_acc + u);
          } else {
            multiply(typename Format::template UnitTile<1>(units + u, pair, lane), set_acc + u);
          }
        }
      }
      __syncwarp();  // the units have been read
#pragma unroll 1
      for (int u = 0; u < num_units; ++u) {
        producer.Request(ring + slot * kUnitBytes + 16 * lane);
        slot = slot + 1 == num_slots ? 0 : slot + 1;
      }
    };
#pragma unroll 1
    for (int i = 0; i < own_slices; i += kSets) {
      multiply_slice(i, acc);
      if constexpr (kSets == 2) {
        if (i + 1 < own_slices) multiply_slice(i + 1, acc + kUnits);
      }
    }
    ReduceAndStore<Format, kTiles, kUnits>(params, acc, unit, num_units, sums, turn);
    unit += num_units;
  }
}

template <typename Format, int kTiles>
QuantizedShape ShapeFor(int m, int num_units, const StreamGemmDevice& device) {
  QuantizedShape shape;
  const int for_sums = Reduction<Format, kTiles>::Bytes(m);
  shape.num_slots = std::min(
      (device.max_shared_bytes - for_sums) / (Format::kWarps * Format::kUnitBytes), kMaxSlots);
  shape.units_per_block = (num_units + device.num_sms - 1) / device.num_sms;
  const int most = std::max(std::min(Format::kMaxUnits, shape.num_slots), 1);
  const int num_chunks = (shape.units_per_block + most - 1) / most;
  shape.chunk_units = (shape.units_per_block + num_chunks - 1) / num_chunks;
  return shape;
}

template <typename Format, int kTiles>
void Launch(const StreamGemmParams& params, const StreamGemmDevice& device) {
  constexpr auto kKernel = QuantizedStreamKernel<Format, kTiles>;
  AllowSharedBytes<kKernel>(device.max_shared_bytes);
  const QuantizedShape shape = ShapeFor<Format, kTiles>(params.m, params.num_units, device);
  const int shared_bytes = Format::kWarps * shape.num_slots * Format::kUnitBytes +
                           Reduction<Format, kTiles>::Bytes(params.m);
  const int grid = (params.num_units + shape.units_per_block - 1) / shape.units_per_block;
  LaunchKernel(kKernel,
               {.grid = dim3(grid),
                .block = dim3(Format::kWarps * 32),
                .shared_bytes = static_cast<size_t>(shared_bytes)},
               device.stream, params, shape);
}

// Rows of x that one launch takes, at most eight a tile: a ring should have two slots.
template <typename Format, int kTiles>
int MaxRowsOf(const StreamGemmDevice& device) {
  int rows = 8 * kTiles;
  while (rows > 1 && ShapeFor<Format, kTiles>(rows, 1, device).num_slots < 2) --rows;
  return rows;
}

// Sixteen warps hide each other's latencies best, but 16 rows of x need the registers of eight.
// From 33 rows on, where rows share their sums, tiles are faster than passes of 16 rows. An 8B
// layer of Q4_0 on an H100 (2026-11-26), us: a pass 79, a tile of up to 64 rows 231.
template <WeightType kType>
void Multiply(const StreamGemmParams& params, const StreamGemmDevice& device) {
  using Format = QuantizedFormat<kType, 16>;
  using WideFormat = QuantizedFormat<kType, 8>;
  using SameWideFormat = QuantizedFormat<kType, 8, 16>;
  if (params.m > 16 && device.has_clusters && !device.same_sums) {
    ClusterGemmQuantized(kType, params, device);
  } else if (params.m > (device.has_clusters ? 32 : kMaxStreamedRows)) {
    TileGemm<Format, 2, 8>(params, device);
  } else if (params.m <= 8 || (device.same_sums && MaxRowsOf<SameWideFormat, 2>(device) < 16)) {
    ForRows(params, MaxRowsOf<Format, 1>(device),
            [&](const StreamGemmParams& rows) { Launch<Format, 1>(rows, device); });
  } else if (device.same_sums) {
    ForRows(params, 16, [&](const StreamGemmParams& rows) {
      rows.m <= 8 ? Launch<Format, 1>(rows, device) : Launch<SameWideFormat, 2>(rows, device);
    });
  } else {
    ForRows(params, MaxRowsOf<WideFormat, 2>(device),
            [&](const StreamGemmParams& rows) { Launch<WideFormat, 2>(rows, device); });
  }
}

}  // namespace

void StreamGemmQuantized(WeightType type, const StreamGemmParams& params,
                         const StreamGemmDevice& device) {
  DispatchQuantized(type, [&]<WeightType kType>() { Multiply<kType>(params, device); });
}

}  // namespace gloam::cuda
