// The streaming product with bf16 weights, row-major.
#include "kernels/cuda/gemm/stream.cuh"
#include "kernels/cuda/gemm/tile.cuh"

namespace gloam::cuda {
namespace {

// A stage is 64 columns: 128 bytes of every row. Lane 4g + t multiplies columns 8t .. 8t + 7 of
// each run of 32, of rows g and g + 8 of W and of row g of x.
struct BF16Format {
  static constexpr int kWarps = 8;
  static constexpr int kSumGroups = kWarps;
  static constexpr int kMaxUnits = 2;  // of a chunk; leaves a ring six stages
  static constexpr int kColumns = 64;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kUnitBytes = kUnitRows * kRowBytes;
  static constexpr bool kHasRowScales = false;
  static constexpr float kSumScale = 1;

  struct Source {
    const char* data = nullptr;  // this lane's first 16 bytes
    int rows = 0;                // of the segment, from this lane's first on
  };

  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int lane) {
    const int row = unit * kUnitRows + lane / 8;
    return {static_cast<const char*>(segment.weight) + (int64_t{row} * k + 8 * (lane % 8)) * 2,
            segment.rows - row};
  }

  // Unit `unit` of the chunk.
  static __device__ __forceinline__ void Request(const Source& source, int unit, char* to,
                                                 int stage, int k, int lane) {
    const bool in_row = stage * kColumns + 8 * (lane % 8) < k;
    const char* data = source.data + int64_t{unit} * kUnitRows * 2 * k + stage * kRowBytes;
    const uint32_t address =
        SharedAddress(to) + lane / 8 * kRowBytes + 16 * SwizzledChunk(lane / 8, lane % 8);
#pragma unroll
    for (int i = 0; i < kUnitRows / 4; ++i) {
      CopyAsync16(address + i * 4 * kRowBytes, data,
                  in_row && unit * kUnitRows + 4 * i < source.rows);
      data += int64_t{8} * k;
    }
  }

  template <int kTiles, int kUnits>
  static __device__ __forceinline__ void Multiply(const char* units, int num_units, const char* x,
                                                  int m, int lane,
                                                  float (&acc)[kUnits][kTiles][4]) {
    const int g = lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        // Rows past the last multiply into columns of the result that nobody stores.
        const int row = min(8 * n + g, m - 1);
        b[n] = *reinterpret_cast<const uint4*>(x + row * kRowBytes +
                                               16 * SwizzledChunk(row, 4 * half + lane % 4));
      }
      const char* w = units + g * kRowBytes + 16 * SwizzledChunk(g, 4 * half + lane % 4);
#pragma unroll
      for (int first = 0; first < kUnits; first += 2) {
        if (first >= num_units) break;
#pragma unroll
        for (int u = first; u < first + 2; ++u) {
          const char* unit = w + (u < num_units ? u : first) * kUnitBytes;
          const uint4 low = *reinterpret_cast<const uint4*>(unit);
          const uint4 high = *reinterpret_cast<const uint4*>(unit + 8 * kRowBytes);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            MultiplyAdd(acc[u][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
            MultiplyAdd(acc[u][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
          }
        }
      }
    }
  }
};

}  // namespace

void StreamGemmBF16(const StreamGemmParams& params, const StreamGemmDevice& device) {
  if (params.m > kMaxStreamedRows) return TileGemm<BF16Format, 4, 8>(params, device);
  StreamGemm<BF16Format, 4>(params, device);
}

}  // namespace gloam::cuda
