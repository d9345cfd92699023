// Weights as fp8 (e4m3) with an fp32 scale per row: quantised on load, multiplied as bf16, which
// holds every e4m3 exactly.
//
// Layout: units of 16 rows, stages of 128 columns, as of the 8-bit types in packed_weight.cuh:
// [units][stages][4 runs][32 lanes][16 bytes: row g: elements 0, 2, 1, 3, 4, 6, 5, 7; row g + 8].
#include <cuda_fp8.h>

#include "base/check.h"
#include "kernels/cuda/gemm/packed_weight.cuh"
#include "kernels/cuda/gemm/stream.cuh"
#include "kernels/cuda/gemm/tile.cuh"

namespace gloam::cuda {
namespace {

constexpr int kStageBytes = kUnitRows * kStageColumns;
constexpr float kLargestE4M3 = 448;
constexpr int kThreads = 256;

// Two e4m3 in bits [0, 8) and [16, 24) (odd: [8, 16) and [24, 32)) as bf16: the bits in the places
// of bf16's make 2^-120 of the value, subnormals included.
__device__ __forceinline__ uint32_t UnpackPair(uint32_t word, bool odd) {
  const uint32_t sign = (odd ? word : word << 8) & 0x80008000;
  const uint32_t bits = ((odd ? word >> 4 : word << 4) & 0x07f007f0) | sign;
  constexpr uint32_t k2To120 = 0x7b807b80;
  __nv_bfloat162 small, factor;
  memcpy(&small, &bits, 4);
  memcpy(&factor, &k2To120, 4);
  const __nv_bfloat162 value = __hmul2(small, factor);
  uint32_t out;
  memcpy(&out, &value, 4);
  return out;
}

// Element pair p of row g + 8 * hi.
__device__ __forceinline__ void UnpackRun(const char* stage, int run, int lane,
                                          uint32_t (&out)[2][4]) {
  const uint4 words = reinterpret_cast<const uint4*>(stage)[32 * run + lane];
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    out[j / 2][2 * (j % 2)] = UnpackPair(word[j], false);
    out[j / 2][2 * (j % 2) + 1] = UnpackPair(word[j], true);
  }
}

struct FP8Format {
  static constexpr int kWarps = 8;
  static constexpr int kSumGroups = kWarps;
  static constexpr int kMaxUnits = 4;  // of a chunk
  static constexpr int kColumns = kStageColumns;
  static constexpr int kUnitBytes = kStageBytes;
  static constexpr bool kHasRowScales = true;
  static constexpr float kSumScale = 1;

  struct Source {
    const char* data = nullptr;  // the chunk's first stage
  };

  static __device__ __forceinline__ Source FindSource(const GemmSegment& segment, int unit, int k,
                                                      int) {
    return {static_cast<const char*>(segment.weight) + unit * NumStages(k) * kUnitBytes};
  }

  // Unit `unit` of the chunk.
  static __device__ __forceinline__ void Request(const Source& source, int unit, char* to,
                                                 int stage, int k, int lane) {
    const char* data = source.data + (unit * NumStages(k) + stage) * kUnitBytes + 16 * lane;
    const uint32_t address = SharedAddress(to) + 16 * lane;
#pragma unroll
    for (int i = 0; i < kUnitBytes / 512; ++i) CopyAsync16(address + 512 * i, data + 512 * i, true);
  }

  template <int kTiles, int kUnits>
  static __device__ __forceinline__ void Multiply(const char* units, int num_units, const char* x,
                                                  int m, int lane,
                                                  float (&acc)[kUnits][kTiles][4]) {
    const int g = lane / 4;
#pragma unroll
    for (int run = 0; run < kRunsPerStage; ++run) {
      uint4 b[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int row = min(8 * n + g, m - 1);
        b[n] = *reinterpret_cast<const uint4*>(x + row * (kColumns * 2) +
                                               16 * SwizzledChunk(row, 4 * run + lane % 4));
      }
#pragma unroll
      for (int first = 0; first < kUnits; first += 2) {
        if (first >= num_units) break;
#pragma unroll
        for (int u = first; u < first + 2; ++u) {
          uint32_t a[2][4];
          UnpackRun(units + (u < num_units ? u : first) * kUnitBytes, run, lane, a);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            MultiplyAdd(acc[u][n], a[0][0], a[1][0], a[0][1], a[1][1], b[n].x, b[n].y);
            MultiplyAdd(acc[u][n], a[0][2], a[1][2], a[0][3], a[1][3], b[n].z, b[n].w);
          }
        }
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ float ToFloat(T value) {
  return static_cast<float>(value);
}

// A block for every unit: 16 warps find the rows' largest magnitudes, then all threads pack.
template <typename T>
__global__ void PackKernel(const T* source, int64_t num_rows, int64_t cols, char* out,
                           float* row_scales) {
  __shared__ float scales[kUnitRows];
  const int64_t first_row = int64_t{blockIdx.x} * kUnitRows;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float largest = 0;
  if (first_row + warp < num_rows) {
    const T* row = source + (first_row + warp) * cols;
    for (int64_t i = lane; i < cols; i += 32) largest = fmaxf(largest, fabsf(ToFloat(row[i])));
  }
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
  }
  if (lane == 0) {
    scales[warp] = largest > 0 ? largest / kLargestE4M3 : 1.0f;
    if (first_row + warp < num_rows) row_scales[first_row + warp] = scales[warp];
  }
  __syncthreads();
  const int64_t words = NumStages(cols) * kStageBytes / 4;
  auto* unit = reinterpret_cast<uint32_t*>(out + blockIdx.x * NumStages(cols) * kStageBytes);
  for (int64_t i = threadIdx.x; i < words; i += blockDim.x) {
    const int in_lane = static_cast<int>(i % 4);
    const int to_lane = static_cast<int>(i / 4 % 32);
    const int64_t run = i / 128;
    const int row = to_lane / 4 + 8 * (in_lane / 2);
    uint32_t word = 0;
    for (int e = 0; e < 4; ++e) {
      const int64_t column =
          run * kRunElements + ColumnOf<false>(to_lane % 4, 4 * (in_lane % 2) + e);
      if (first_row + row >= num_rows || column >= cols) continue;
      const float value = ToFloat(source[(first_row + row) * cols + column]) / scales[row];
      const uint32_t bits = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
      const int place = e == 1 ? 2 : e == 2 ? 1 : e;
      word |= bits << (8 * place);
    }
    unit[i] = word;
  }
}

// Calls store(row 0..15, column of the stage, two neighbouring e4m3) for what `lane` holds.
template <typename Store>
__device__ __forceinline__ void DecodeLane(const char* stage, int lane, Store&& store) {
  for (int run = 0; run < kRunsPerStage; ++run) {
    uint32_t pairs[2][4];
    UnpackRun(stage, run, lane, pairs);
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        __nv_bfloat162 both;
        memcpy(&both, &pairs[hi][p], 4);
        store(lane / 4 + 8 * hi, kRunElements * run + ColumnOf<false>(lane % 4, 2 * p),
              __bfloat1622float2(both));
      }
    }
  }
}

__global__ void DequantizeKernel(const char* stages, const float* row_scales, int num_stages,
                                 int64_t num_lanes, int64_t num_rows, int cols,
                                 __nv_bfloat16* out) {
  WaitForEarlierKernels();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_lanes) return;
  const int stage = static_cast<int>(index / 32 % num_stages);
  const int64_t unit = index / 32 / num_stages;
  DecodeLane(stages + (unit * num_stages + stage) * kStageBytes, static_cast<int>(index % 32),
             [&](int row_in_unit, int column, float2 value) {
               const int64_t row = unit * kUnitRows + row_in_unit;
               column += stage * kStageColumns;
               if (row >= num_rows || column >= cols) return;
               value.x *= row_scales[row];
               value.y *= row_scales[row];
               *reinterpret_cast<__nv_bfloat162*>(out + row * cols + column) =
                   __float22bfloat162_rn(value);
             });
}

// A block for every token.
__global__ void EmbedKernel(const char* stages, const float* row_scales, int num_stages, int cols,
                            const int32_t* token_ids, char* out, int64_t out_row_bytes,
                            bool out_is_bf16) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t token = token_ids[blockIdx.x];
  const float scale = row_scales[token];
  const char* unit = stages + token / kUnitRows * num_stages * kStageBytes;
  char* out_row = out + blockIdx.x * out_row_bytes;
  for (int stage = threadIdx.x / 32; stage < num_stages; stage += kThreads / 32) {
    DecodeLane(unit + int64_t{stage} * kStageBytes, threadIdx.x % 32,
               [&](int row, int column, float2 value) {
                 column += stage * kStageColumns;
                 if (row != token % kUnitRows || column >= cols) return;
                 if (out_is_bf16) {
                   auto* to = reinterpret_cast<__nv_bfloat16*>(out_row);
                   to[column] = __float2bfloat16(value.x * scale);
                   to[column + 1] = __float2bfloat16(value.y * scale);
                 } else {
                   auto* to = reinterpret_cast<float*>(out_row);
                   to[column] = value.x * scale;
                   to[column + 1] = value.y * scale;
                 }
               });
  }
}

}  // namespace

void StreamGemmFP8(const StreamGemmParams& params, const StreamGemmDevice& device) {
  if (params.m > kMaxStreamedRows) return TileGemm<FP8Format, 4, 8>(params, device);
  StreamGemm<FP8Format, 2>(params, device);
}

int64_t FP8Bytes(int64_t rows, int64_t cols) {
  return NumUnits(rows) * NumStages(cols) * kStageBytes;
}

void PackFP8(WeightType type, const void* source, int64_t first_row, int64_t num_rows, int64_t cols,
             void* out, float* row_scales, cudaStream_t stream) {
  GLOAM_CHECK(first_row % kUnitRows == 0);
  char* to = static_cast<char*>(out) + FP8Bytes(first_row, cols);
  const auto launch = [&]<typename T>(const T* typed) {
    PackKernel<T><<<static_cast<unsigned>(NumUnits(num_rows)), kUnitRows * 32, 0, stream>>>(
        typed, num_rows, cols, to, row_scales + first_row);
  };
  switch (type) {
    case WeightType::kF32:
      launch(static_cast<const float*>(source));
      break;
    case WeightType::kF16:
      launch(static_cast<const __half*>(source));
      break;
    case WeightType::kBF16:
      launch(static_cast<const __nv_bfloat16*>(source));
      break;
    default:
      GLOAM_CHECK(!"F32, F16 or BF16");
  }
  GLOAM_CUDA_CHECK(cudaGetLastError());
}

void DequantizeFP8(const DeviceMatrix& matrix, int64_t first_row, int64_t num_rows, void* out,
                   cudaStream_t stream) {
  GLOAM_CHECK(first_row % kUnitRows == 0);
  const int64_t num_stages = NumStages(matrix.cols);
  const int64_t num_lanes = NumUnits(num_rows) * num_stages * 32;
  LaunchKernel(DequantizeKernel,
               {.grid = dim3((num_lanes + kThreads - 1) / kThreads), .block = kThreads}, stream,
               static_cast<const char*>(matrix.data) + FP8Bytes(first_row, matrix.cols),
               matrix.row_scales + first_row, static_cast<int>(num_stages), num_lanes, num_rows,
               static_cast<int>(matrix.cols), static_cast<__nv_bfloat16*>(out));
}

void EmbedFP8(const DeviceMatrix& matrix, const int32_t* token_ids, int64_t num_tokens, void* out,
              int64_t out_stride, bool out_is_bf16, cudaStream_t stream) {
  LaunchKernel(EmbedKernel, {.grid = dim3(num_tokens), .block = kThreads}, stream,
               static_cast<const char*>(matrix.data), matrix.row_scales,
               static_cast<int>(NumStages(matrix.cols)), static_cast<int>(matrix.cols), token_ids,
               static_cast<char*>(out), out_stride * (out_is_bf16 ? 2 : 4), out_is_bf16);
}

}  // namespace gloam::cuda
