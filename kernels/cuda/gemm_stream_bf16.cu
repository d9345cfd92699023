// The streaming product with bf16 weights, row-major.
#include "kernels/cuda/gemm_stream.cuh"
#include "kernels/cuda/gemm_tile.cuh"

namespace gloam::cuda {
namespace {

// A stage is 64 columns: 128 bytes of every row. Lane 4g + t multiplies columns 8t .. 8t + 7 of
// each run of 32, of rows g and g + 8 of W and of row g of x.
template <int kNumWarps, int kNumUnits>
struct BF16Format {
  static constexpr int kWarps = kNumWarps;
  static constexpr int kUnits = kNumUnits;
  static constexpr int kColumns = 64;
  static constexpr int kUnitBytes = kUnitRows * kColumns * 2;
  static constexpr bool kHasRowScales = false;

  struct Source {
    const char* data = nullptr;  // this lane's first 16 bytes
    int rows = 0;                // of the unit, from this lane's first on
  };

  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int lane) {
    const int row = unit * kUnitRows + lane / 8;
    return {static_cast<const char*>(segment.weight) + (int64_t{row} * k + 8 * (lane % 8)) * 2,
            segment.rows - row};
  }

  static __device__ __forceinline__ void Request(const Source& source, char* to, int stage, int k,
                                                 int lane) {
    const int column = stage * kColumns + 8 * (lane % 8);
    const char* data = source.data + stage * (kColumns * 2);
    const uint32_t address =
        SharedAddress(to) + lane / 8 * (kColumns * 2) + 16 * SwizzledChunk(lane / 8, lane % 8);
#pragma unroll
    for (int i = 0; i < kUnitRows / 4; ++i) {
      const bool valid = 4 * i < source.rows && column < k;
      CopyAsync16(address + i * 4 * kColumns * 2, valid ? data + int64_t{i} * 8 * k : source.data,
                  valid);
    }
  }

  static __device__ __forceinline__ void Prefetch(const Source& source, int stage, int k,
                                                  int lane) {
    const int row = lane - lane / 8;  // after the source's: lane 0..15 takes row `lane`
    if (lane >= kUnitRows || row >= source.rows) return;
    PrefetchLine(source.data + int64_t{row} * k * 2 - 16 * (lane % 8) + stage * (kColumns * 2));
  }

  template <int kTiles>
  static __device__ __forceinline__ void Multiply(const char* units, const char* x, int m, int lane,
                                                  float (&acc)[kUnits][kTiles][4]) {
    const int g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = 16 * SwizzledChunk(g, 4 * half + lane % 4);
      uint4 b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        // Rows past the last multiply into columns of the result that nobody stores.
        const int row = min(8 * n + g, m - 1);
        b[n] = *reinterpret_cast<const uint4*>(x + row * (kColumns * 2) +
                                               16 * SwizzledChunk(row, 4 * half + lane % 4));
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const char* w = units + u * kUnitBytes + g * (kColumns * 2) + offset;
        const uint4 low = *reinterpret_cast<const uint4*>(w);
        const uint4 high = *reinterpret_cast<const uint4*>(w + 8 * kColumns * 2);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          MultiplyAdd(acc[u][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
          MultiplyAdd(acc[u][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
        }
      }
    }
  }
};

}  // namespace

void StreamGemmBF16(const StreamGemmParams& params, const StreamGemmDevice& device) {
  constexpr int kWarps = 8;
  if (params.m > kMaxStreamedRows) return TileGemm<BF16Format<kWarps, 4>, 4>(params, device);
  StreamGemm<BF16Format<kWarps, 2>, 4>(params, device);
}

}  // namespace gloam::cuda
