// The streaming product with GGUF weights, which stay packed until they are in registers: the
// integers become bf16 exactly, the products of each run are summed in fp32 and scaled there.
#include "kernels/cuda/gemm_stream.cuh"
#include "kernels/cuda/gemm_tile.cuh"
#include "kernels/cuda/packed_weight.cuh"

namespace gloam::cuda {
namespace {

template <WeightType kType>
struct QuantizedFormat {
  using P = PackedStage<kType>;
  static constexpr int kWarps = 8;
  static constexpr int kMaxUnits = P::kBits == 8 ? 4 : 8;  // of a chunk
  static constexpr int kColumns = kStageColumns;
  static constexpr int kUnitBytes = P::kBytes;
  static constexpr bool kHasRowScales = false;

  struct Source {
    const char* data = nullptr;  // the chunk's first stage
  };

  static __device__ __forceinline__ int64_t BytesOfUnit(int k) {
    return int64_t{(k + kColumns - 1) / kColumns} * kUnitBytes;
  }

  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int) {
    return {static_cast<const char*>(segment.weight) + unit * BytesOfUnit(k)};
  }

  // Unit `unit` of the chunk.
  static __device__ __forceinline__ void Request(const Source& source, int unit, char* to,
                                                 int stage, int k, int lane) {
    const char* data =
        source.data + unit * BytesOfUnit(k) + int64_t{stage} * kUnitBytes + 16 * lane;
    const uint32_t address = SharedAddress(to) + 16 * lane;
#pragma unroll
    for (int i = 0; i < (kUnitBytes + 511) / 512; ++i) {
      if (512 * i + 16 * lane < kUnitBytes) CopyAsync16(address + 512 * i, data + 512 * i, true);
    }
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

  template <int kTiles, int kUnits>
  static __device__ __forceinline__ void Multiply(const char* units, int num_units, const char* x,
                                                  int m, int lane,
                                                  float (&acc)[kUnits][kTiles][4]) {
    constexpr uint32_t kOnes = 0x3f803f80;  // bf16
#pragma unroll
    for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
      uint4 b[2][kTiles];
      float x_sums[2][kTiles][4] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          b[r][n] = LoadX(x, min(8 * n + lane / 4, m - 1), 2 * pair + r, lane % 4);
          if constexpr (P::kHasMin) {
            MultiplyAdd(x_sums[r][n], kOnes, kOnes, kOnes, kOnes, b[r][n].x, b[r][n].y);
            MultiplyAdd(x_sums[r][n], kOnes, kOnes, kOnes, kOnes, b[r][n].z, b[r][n].w);
          }
        }
      }
#pragma unroll
      for (int first = 0; first < kUnits; first += 2) {
        if (first >= num_units) break;
#pragma unroll
        for (int u = first; u < first + 2; ++u) {
          MultiplyUnit<kTiles>(units + (u < num_units ? u : first) * kUnitBytes, pair, lane, b,
                               x_sums, acc[u]);
        }
      }
    }
  }

  // One pair of runs of one unit.
  template <int kTiles>
  static __device__ __forceinline__ void MultiplyUnit(const char* unit, int pair, int lane,
                                                      const uint4 (&b)[2][kTiles],
                                                      const float (&x_sums)[2][kTiles][4],
                                                      float (&acc)[kTiles][4]) {
    uint32_t a[2][2][4];
    UnpackRunPair<kType>(unit, pair, lane, a);
    const PairScales<kType> scales(unit, pair, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RunScale low = scales.Get(r, 0);
      const RunScale high = scales.Get(r, 1);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float part[4] = {};
        MultiplyAdd(part, a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1], b[r][n].x, b[r][n].y);
        if constexpr (P::kHalves) {
          AddScaled(part, low.s[0], high.s[0], acc[n]);
          for (float& p : part) p = 0;
        }
        MultiplyAdd(part, a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3], b[r][n].z, b[r][n].w);
        AddScaled(part, low.s[1], high.s[1], acc[n]);
        if constexpr (P::kHasMin) AddScaled(x_sums[r][n], -low.m, -high.m, acc[n]);
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
  if (params.m > kMaxStreamedRows) return TileGemm<QuantizedFormat<kType>, 2>(params, device);
  StreamGemm<QuantizedFormat<kType>, 2>(params, device);
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
