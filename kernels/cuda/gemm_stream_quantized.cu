// The streaming product with GGUF weights, which stay packed until they are in registers: the
// integers become bf16 exactly, the products of each run are summed in fp32 and scaled there.
#include "kernels/cuda/gemm_stream.cuh"
#include "kernels/cuda/gemm_tile.cuh"
#include "kernels/cuda/packed_weight.cuh"

namespace gloam::cuda {
namespace {

template <WeightType kType, int kNumUnits>
struct QuantizedFormat {
  using P = PackedStage<kType>;
  static constexpr int kWarps = 8;
  static constexpr int kUnits = kNumUnits;
  static constexpr int kColumns = kStageColumns;
  static constexpr int kUnitBytes = P::kBytes;
  static constexpr bool kHasRowScales = false;

  struct Source {
    const char* data = nullptr;  // the unit's first stage, or null
  };

  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int) {
    const int64_t stages = (k + kColumns - 1) / kColumns;
    return {static_cast<const char*>(segment.weight) + unit * stages * kUnitBytes};
  }

  static __device__ __forceinline__ void Request(const Source& source, char* to, int stage, int,
                                                 int lane) {
    if (source.data == nullptr) return;  // what the ring holds multiplies into unused sums
    const char* data = source.data + int64_t{stage} * kUnitBytes;
    const uint32_t address = SharedAddress(to);
#pragma unroll
    for (int i = 0; i < (kUnitBytes + 511) / 512; ++i) {
      const int at = 512 * i + 16 * lane;
      if (at < kUnitBytes) CopyAsync16(address + at, data + at, true);
    }
  }

  static __device__ __forceinline__ void Prefetch(const Source& source, int stage, int, int lane) {
    if (source.data == nullptr || 128 * lane >= kUnitBytes) return;
    PrefetchLine(source.data + int64_t{stage} * kUnitBytes + 128 * lane);
  }

  // Row `row` of x, what this lane multiplies of run `run`.
  static __device__ __forceinline__ uint4 LoadX(const char* x, int row, int run, int t) {
    const char* x_row = x + row * (kColumns * 2);
    if constexpr (P::kHalves) {
      const auto half = [&](int h) {
        return *reinterpret_cast<const uint2*>(
            x_row + 16 * SwizzledChunk(row, 4 * run + 2 * h + t / 2) + 8 * (t % 2));
      };
      const uint2 first = half(0), second = half(1);
      return make_uint4(first.x, first.y, second.x, second.y);
    }
    return *reinterpret_cast<const uint4*>(x_row + 16 * SwizzledChunk(row, 4 * run + t));
  }

  template <int kTiles>
  static __device__ __forceinline__ void Multiply(const char* units, const char* x, int m, int lane,
                                                  float (&acc)[kUnits][kTiles][4]) {
    constexpr uint32_t kOnes = 0x3f803f80;  // bf16
    const int g = lane / 4;
#pragma unroll
    for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
      uint4 b[2][kTiles];
      float x_sums[2][kTiles][4] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          b[r][n] = LoadX(x, min(8 * n + g, m - 1), 2 * pair + r, lane % 4);
          if constexpr (P::kHasMin) {
            MultiplyAdd(x_sums[r][n], kOnes, kOnes, kOnes, kOnes, b[r][n].x, b[r][n].y);
            MultiplyAdd(x_sums[r][n], kOnes, kOnes, kOnes, kOnes, b[r][n].z, b[r][n].w);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const char* unit = units + u * kUnitBytes;
        uint32_t a[2][2][4];
        UnpackRunPair<kType>(unit, pair, lane, a);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const RunScale low = LoadScale<kType>(unit, 2 * pair + r, g);
          const RunScale high = LoadScale<kType>(unit, 2 * pair + r, g + 8);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            float part[4] = {};
            MultiplyAdd(part, a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1], b[r][n].x, b[r][n].y);
            if constexpr (P::kHalves) {
              AddScaled(part, low.s[0], high.s[0], acc[u][n]);
              for (float& p : part) p = 0;
            }
            MultiplyAdd(part, a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3], b[r][n].z, b[r][n].w);
            AddScaled(part, low.s[1], high.s[1], acc[u][n]);
            if constexpr (P::kHasMin) AddScaled(x_sums[r][n], -low.m, -high.m, acc[u][n]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void AddScaled(const float (&part)[4], float low, float high,
                                                   float (&acc)[4]) {
    acc[0] = fmaf(part[0], low, acc[0]);
    acc[1] = fmaf(part[1], low, acc[1]);
    acc[2] = fmaf(part[2], high, acc[2]);
    acc[3] = fmaf(part[3], high, acc[3]);
  }
};

template <WeightType kType>
void Multiply(const StreamGemmParams& params, const StreamGemmDevice& device) {
  if (params.m > kMaxStreamedRows) return TileGemm<QuantizedFormat<kType, 4>, 2>(params, device);
  StreamGemm<QuantizedFormat<kType, 2>, 2>(params, device);
}

}  // namespace

void StreamGemmQuantized(WeightType type, const StreamGemmParams& params,
                         const StreamGemmDevice& device) {
  switch (type) {
    case WeightType::kQ4_0:
      return Multiply<WeightType::kQ4_0>(params, device);
    case WeightType::kQ4_1:
      return Multiply<WeightType::kQ4_1>(params, device);
    case WeightType::kQ5_0:
      return Multiply<WeightType::kQ5_0>(params, device);
    case WeightType::kQ5_1:
      return Multiply<WeightType::kQ5_1>(params, device);
    case WeightType::kQ8_0:
      return Multiply<WeightType::kQ8_0>(params, device);
    case WeightType::kQ4_K:
      return Multiply<WeightType::kQ4_K>(params, device);
    case WeightType::kQ5_K:
      return Multiply<WeightType::kQ5_K>(params, device);
    case WeightType::kQ6_K:
      return Multiply<WeightType::kQ6_K>(params, device);
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  GLOAM_CHECK(!"a quantised weight type");
}

}  // namespace gloam::cuda
