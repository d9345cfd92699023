// The product of one row of x with GGUF weights: y = x W^T, limited by reading W once from memory.
//
// A thread block owns a few units (16 rows of W). Its warps split the columns into spans of 256:
// warp w takes spans w, w + kWarps, ... of every unit. Each warp keeps a ring of spans of its own
// in shared memory that the copy engine fills. Two blocks share an SM: eight warps wait for their
// own instructions too often to read at full rate, and where a product's blocks have left, the next
// one's begin to read. Weights never change. (Llama-3.1-8B's Q4_0 step on an H100, 2k of context,
// 2026-11-26: 2.24 ms with a block per SM, 2.07 with two.)
//
// A tensor core's tile has eight columns for one row of x, so that each of a span's eight runs (of
// 32 columns, with a scale) gets one: column r of the product of run r's weights is what is wanted,
// and the lane that holds it scales and adds it.
//
// Order of summation: within a warp by columns, by the lanes' runs, then warps 0, 1, ...: it
// depends on the number of columns and the format alone.
//
// Bytes: those of W; x, from L2, k * 2 for every block.
#include "kernels/cuda/gemm/row_quantized.h"

#include <algorithm>

#include "kernels/cuda/gemm/packed_weight.cuh"
#include "kernels/cuda/launch.cuh"

namespace gloam::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSpanColumns = 2 * kStageColumns;
constexpr int kSpanRuns = kSpanColumns / kRunElements;
constexpr int kBlocksPerSM = 2;
constexpr int kMaxSlots = 8;
constexpr int kOtherBytes = 1 << 10;  // of a block's shared memory: the barriers; the driver's
// Of a block: more would let the sums' memory grow.
constexpr int kMaxBlockUnits = 16;
constexpr int kSumStride = kWarps * kUnitRows + 16;  // of a unit; two units' rows in all banks

// What StoreOutput multiplies a sum by: integers are 2^-133 of themselves (UnpackRunPair), x is
// multiplied by 2^64.
struct SumFormat {
  static constexpr bool kHasRowScales = false;
  static constexpr float kSumScale = 0x1p69;
};

struct RowShape {
  int units_per_block = 0;
  int num_slots = 0;  // of a warp's ring, each of a span
};

template <WeightType kType>
struct Span {
  using P = PackedStage<kType>;
  static constexpr int kBytes = 2 * P::kBytes;
  static constexpr int kSums = P::kHalves ? 2 : 1;  // of a run
  static constexpr int kXBytes = kSpanColumns * 2 + kSpanRuns * kSums * 4;
  // The sums of a run's x are ready to be added to its products, or to be multiplied by its min.
  static constexpr float kSumFactor =
      -static_cast<float>(P::kHasMin ? 1 : P::kTraits.offset) / SumFormat::kSumScale;
};

// ---- The copy engine, from compute capability 9.0 on

__device__ __forceinline__ void InitBarrier([[maybe_unused]] uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}
// Barriers have been made: the copy engine sees them.
__device__ __forceinline__ void FenceBarriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void CopyBulk([[maybe_unused]] uint32_t to,
                                         [[maybe_unused]] const void* source,
                                         [[maybe_unused]] int bytes,
                                         [[maybe_unused]] uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void WaitForBarrier([[maybe_unused]] uint32_t barrier,
                                               [[maybe_unused]] uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// What a warp has still to request: of every unit the spans of its columns.
template <WeightType kType>
struct SpanProducer {
  const StreamGemmParams& params;
  const int end_unit;
  const int num_stages;
  const int warp;
  const int lane;
  int unit;
  int stage;  // first of the span
  const char* source = nullptr;

  __device__ __forceinline__ SpanProducer(const StreamGemmParams& p, int first, int end,
                                          int warp_index, int lane_index)
      : params(p),
        end_unit(end),
        num_stages(static_cast<int>(NumStages(p.k))),
        warp(warp_index),
        lane(lane_index),
        unit(first),
        stage(2 * warp_index) {
    if (stage >= num_stages) unit = end;
    FindSource();
  }

  __device__ __forceinline__ void FindSource() {
    if (unit >= end_unit) return;
    const GemmSegment& segment = params.segments[SegmentOf(params, unit)];
    source = static_cast<const char*>(segment.weight) +
             (int64_t{unit - segment.first_unit} * num_stages + stage) * PackedStage<kType>::kBytes;
  }

  __device__ __forceinline__ void Request(uint32_t to, uint32_t barrier) {
    if (unit >= end_unit) return;
    if (lane == 0) {
      const int bytes = min(num_stages - stage, 2) * PackedStage<kType>::kBytes;
      CopyBulk(to, source, bytes, barrier);
    }
    stage += 2 * kWarps;
    source += kWarps * Span<kType>::kBytes;
    if (stage >= num_stages) {
      stage = 2 * warp;
      ++unit;
      FindSource();
    }
  }
};

// ---- x

__device__ __forceinline__ float SumOfPair(uint32_t pair) {
  const float2 both = __bfloat1622float2(AsBF16x2(pair));
  return both.x + both.y;
}

// Lane 4g + t takes its columns (ColumnOf) of run g of each of the warp's spans: they become ready
// to be multiplied by integers, and the sums of the runs are made.
template <WeightType kType>
__device__ __forceinline__ void PrepareX(const StreamGemmParams& params, char* memory,
                                         int own_spans, int warp, int lane) {
  using P = PackedStage<kType>;
  constexpr int kAtOnce = 8;  // loads in flight
  constexpr uint32_t k2To64 = 0x5f805f80;
  constexpr uint32_t kOdd = P::kOddFactor == 16 ? 0x5d805d80 : k2To64;  // 2^60
  const int g = lane / 4;
  const int t = lane % 4;
  const auto* x = static_cast<const __nv_bfloat16*>(params.x);
#pragma unroll 1
  for (int first = 0; first < own_spans; first += kAtOnce) {
    uint4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int column = (warp + (first + i) * kWarps) * kSpanColumns + g * kRunElements;
      values[i] = make_uint4(0, 0, 0, 0);
      if (first + i >= own_spans || column >= params.k) continue;
      const __nv_bfloat16* run = x + column;
      if constexpr (P::kHalves) {
        const uint2 low = reinterpret_cast<const uint2*>(run)[t];
        const uint2 high = reinterpret_cast<const uint2*>(run)[4 + t];
        values[i] = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        values[i] = reinterpret_cast<const uint4*>(run)[t];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= own_spans) break;
      const uint4& v = values[i];
      char* span = memory + (first + i) * Span<kType>::kXBytes;
      reinterpret_cast<uint4*>(span)[lane] =
          make_uint4(MultiplyBF16x2(v.x, k2To64), MultiplyBF16x2(v.y, kOdd),
                     MultiplyBF16x2(v.z, k2To64), MultiplyBF16x2(v.w, kOdd));
      float sums[2] = {SumOfPair(v.x) + SumOfPair(v.y), SumOfPair(v.z) + SumOfPair(v.w)};
      if constexpr (!P::kHalves) sums[0] += sums[1];
#pragma unroll
      for (int s = 0; s < Span<kType>::kSums; ++s) {
        sums[s] += __shfl_xor_sync(0xffffffff, sums[s], 1);
        sums[s] += __shfl_xor_sync(0xffffffff, sums[s], 2);
        if (t == 0) {
          reinterpret_cast<float*>(span + 2 * kSpanColumns)[s * kSpanRuns + g] =
              sums[s] * Span<kType>::kSumFactor;
        }
      }
    }
  }
  __syncwarp();
}

// ---- A span of a unit

// The scales of runs 2t and 2t + 1 of a span, of rows g and g + 8: [run][row].
template <WeightType kType>
__device__ __forceinline__ void LoadScales(const char* span, bool is_whole, int lane,
                                           RunScale (&scales)[2][2]) {
  using P = PackedStage<kType>;
  const int t = lane % 4;
  const char* stage = span + t / 2 * P::kBytes;
  const bool exists = is_whole || t < 2;
  if constexpr (P::kIsK) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        scales[r][hi] = LoadScale<kType>(stage, 2 * (t % 2) + r, lane / 4 + 8 * hi);
      }
    }
  } else {
    const PairScales<kType> pair(stage, t % 2, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) scales[r][hi] = pair.Get(r, hi);
    }
  }
  if (exists) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) scales[r][hi] = {};
  }
}

// acc: of rows g and g + 8, what lane 4g + t adds up.
template <WeightType kType>
__device__ __forceinline__ void MultiplySpan(const char* span, bool is_whole, const char* x_memory,
                                             int lane, float (&acc)[2]) {
  using P = PackedStage<kType>;
  constexpr int kSums = Span<kType>::kSums;
  const int t = lane % 4;
  const uint4 x = reinterpret_cast<const uint4*>(x_memory)[lane];
  float starts[kSums][4] = {};
  float2 sums[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    sums[s] = reinterpret_cast<const float2*>(x_memory + 2 * kSpanColumns)[s * kSpanRuns / 2 + t];
    if constexpr (!P::kHasMin) {
      starts[s][0] = starts[s][2] = sums[s].x;
      starts[s][1] = starts[s][3] = sums[s].y;
    }
  }
  RunScale scales[2][2];
  LoadScales<kType>(span, is_whole, lane, scales);
#pragma unroll
  for (int pair = 0; pair < kSpanRuns / 2; ++pair) {
    uint32_t a[2][2][4];
    UnpackRunPair<kType>(span + pair / 2 * P::kBytes, pair % 2, lane, a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t(&low)[4] = a[r][0];
      const uint32_t(&high)[4] = a[r][1];
      float part[2][4];
      MultiplyAdd(part[0], starts[0], low[0], high[0], low[1], high[1], x.x, x.y);
      MultiplyAdd(part[kSums - 1], P::kHalves ? starts[kSums - 1] : part[0], low[2], high[2],
                  low[3], high[3], x.z, x.w);
      if (t == pair) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          acc[0] = fmaf(part[s][r], scales[r][0].s[s], acc[0]);
          acc[1] = fmaf(part[s][2 + r], scales[r][1].s[s], acc[1]);
        }
      }
    }
  }
  if constexpr (P::kHasMin) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      acc[hi] = fmaf(sums[0].x, scales[0][hi].m, acc[hi]);
      acc[hi] = fmaf(sums[0].y, scales[1][hi].m, acc[hi]);
    }
  }
}

template <WeightType kType>
__global__ void __launch_bounds__(kThreads, 3)
    RowGemmKernel(const __grid_constant__ StreamGemmParams params,
                  const __grid_constant__ RowShape shape) {
  constexpr int kSpanBytes = Span<kType>::kBytes;
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t barriers[kWarps][kMaxSlots];
  AllowNextKernel();
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // known to be the warp's
  const int lane = Kept(static_cast<int>(threadIdx.x % 32));
  const int first_unit = blockIdx.x * shape.units_per_block;
  const int end_unit = min(first_unit + shape.units_per_block, params.num_units);
  const int num_stages = static_cast<int>(NumStages(params.k));
  const int num_spans = (num_stages + 1) / 2;
  const int own_spans = max((num_spans - warp + kWarps - 1) / kWarps, 0);
  const int most_spans = (num_spans + kWarps - 1) / kWarps;
  const int num_slots = shape.num_slots;
  constexpr int kXBytes = Span<kType>::kXBytes;
  const int x_offset = kWarps * num_slots * kSpanBytes;
  const uint32_t ring = Kept(SharedAddress(shared) + warp * num_slots * kSpanBytes);
  const uint32_t x_memory = Kept(SharedAddress(shared) + x_offset + warp * most_spans * kXBytes);
  const uint32_t own_barriers = Kept(SharedAddress(barriers[warp]));
  auto* sums = reinterpret_cast<float*>(shared + x_offset + kWarps * most_spans * kXBytes);

  if (lane < num_slots) InitBarrier(own_barriers + 8 * lane);
  FenceBarriers();
  __syncwarp();
  SpanProducer<kType> producer(params, first_unit, end_unit, warp, lane);
#pragma unroll 1
  for (int i = 0; i < num_slots; ++i) {
    producer.Request(ring + i * kSpanBytes, own_barriers + 8 * i);
  }
  WaitForEarlierKernels();
  PrepareX<kType>(params, SharedPointer(x_memory), own_spans, warp, lane);

  int slot = 0;
  uint32_t memory = ring;  // the slot's
  uint32_t barrier = own_barriers;
  uint32_t parity = 0;
#pragma unroll 1
  for (int unit = first_unit; unit < end_unit; ++unit) {
    float acc[2] = {};
    uint32_t x = x_memory;
    int stage = 2 * warp;
#pragma unroll 1
    for (int i = 0; i < own_spans; ++i) {
      WaitForBarrier(barrier, parity);
      MultiplySpan<kType>(SharedPointer(memory), stage + 1 < num_stages, SharedPointer(x), lane,
                          acc);
      __syncwarp();  // the span has been read
      producer.Request(memory, barrier);
      stage += 2 * kWarps;
      x += kXBytes;
      memory += kSpanBytes;
      barrier += sizeof(uint64_t);
      if (++slot == num_slots) {
        slot = 0;
        memory = ring;
        barrier = own_barriers;
        parity ^= 1;
      }
    }
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
      acc[hi] += __shfl_xor_sync(0xffffffff, acc[hi], 1);
      acc[hi] += __shfl_xor_sync(0xffffffff, acc[hi], 2);
      if (lane % 4 == 0) {
        sums[(unit - first_unit) * kSumStride + warp * kUnitRows + lane / 4 + 8 * hi] = acc[hi];
      }
    }
  }
  __syncthreads();
  const int num_rows = (end_unit - first_unit) * kUnitRows;
  for (int row = threadIdx.x; row < num_rows; row += kThreads) {
    const float* of_warps = sums + row / kUnitRows * kSumStride + row % kUnitRows;
    float value = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += of_warps[w * kUnitRows];
    StoreOutput<SumFormat>(params, first_unit + row / kUnitRows, row % kUnitRows, 0, value);
  }
}

template <WeightType kType>
int SharedBytes(const RowShape& shape, int k) {
  const int num_spans = static_cast<int>((NumStages(k) + 1) / 2);
  const int most_spans = (num_spans + kWarps - 1) / kWarps;
  return kWarps * (shape.num_slots * Span<kType>::kBytes + most_spans * Span<kType>::kXBytes) +
         shape.units_per_block * kSumStride * static_cast<int>(sizeof(float));
}

template <WeightType kType>
RowShape ShapeFor(const StreamGemmParams& params, const StreamGemmDevice& device) {
  RowShape shape;
  const int blocks = kBlocksPerSM * device.num_sms;
  const int most_units = blocks * kMaxBlockUnits;
  const int num_waves = (params.num_units + most_units - 1) / most_units;
  shape.units_per_block = (params.num_units + num_waves * blocks - 1) / (num_waves * blocks);
  const int rest =
      device.max_shared_bytes / kBlocksPerSM - kOtherBytes - SharedBytes<kType>(shape, params.k);
  shape.num_slots = std::clamp(rest / (kWarps * Span<kType>::kBytes), 2, kMaxSlots);
  return shape;
}

template <WeightType kType>
bool Launch(const StreamGemmParams& params, const StreamGemmDevice& device) {
  constexpr auto kKernel = RowGemmKernel<kType>;
  const RowShape shape = ShapeFor<kType>(params, device);
  const int shared_bytes = SharedBytes<kType>(shape, params.k);
  const int max_bytes = device.max_shared_bytes - kOtherBytes;
  if (shared_bytes > max_bytes) return false;
  AllowSharedBytes<kKernel>(max_bytes);
  const int grid = (params.num_units + shape.units_per_block - 1) / shape.units_per_block;
  LaunchKernel(kKernel,
               {.grid = dim3(grid),
                .block = dim3(kThreads),
                .shared_bytes = static_cast<size_t>(shared_bytes)},
               device.stream, params, shape);
  return true;
}

}  // namespace

bool RowGemmQuantized(WeightType type, const StreamGemmParams& params,
                      const StreamGemmDevice& device) {
  bool launched = false;
  DispatchQuantized(type, [&]<WeightType kType>() { launched = Launch<kType>(params, device); });
  return launched;
}

}  // namespace gloam::cuda
