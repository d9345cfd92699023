// Weights on their way into the device's layouts (packed_weight.cuh) and out of them again. None of
// this is in a decode step but EmbedRows; rates are far above the bus that feeds them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "base/check.h"
#include "kernels/cuda/gemm/packed_weight.cuh"
#include "kernels/cuda/gemm/params.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/quant_decode.h"

namespace gloam::cuda {
namespace {

constexpr int kThreads = 256;

int64_t NumBlocks(int64_t num_threads) { return (num_threads + kThreads - 1) / kThreads; }

__global__ void ConvertF32Kernel(const float* in, __nv_bfloat16* out, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) out[i] = __float2bfloat16(in[i]);
}

__global__ void ConvertF16Kernel(const __half* in, __nv_bfloat16* out, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) out[i] = __float2bfloat16(__half2float(in[i]));
}

// What one lane of a stage holds, gathered run by run.
template <WeightType kType>
struct LanePacker {
  using P = PackedStage<kType>;
  char* stage;
  int lane;
  uint32_t fifth[2] = {};
  uint32_t pairs[kRunsPerStage] = {};
  uint64_t sub_scales[2] = {};

  __device__ void Add(const QuantRun& quants, int run, int hi) {
    uint32_t e[8];
    for (int i = 0; i < 8; ++i) {
      const int column = ColumnOf<P::kHalves>(lane % 4, i);
      e[i] = quants.quants[column / 4] >> (8 * (column % 4)) & 0xff;
    }
    auto* words = reinterpret_cast<uint32_t*>(stage);
    if constexpr (P::kBits == 8) {
      uint32_t* out = words + (32 * run + lane) * 4 + 2 * hi;
      for (int j = 0; j < 2; ++j) {
        const uint32_t* four = e + 4 * j;
        out[j] = four[0] | four[2] << 8 | four[1] << 16 | four[3] << 24;
      }
    } else {
      const int j = 2 * (run % 2) + hi;
      uint32_t word = 0;
      for (int p = 0; p < 4; ++p) {
        word |= (e[2 * p] & 15) << (4 * p) | (e[2 * p + 1] & 15) << (16 + 4 * p);
        const uint32_t low = e[2 * p] >> 4, high = e[2 * p + 1] >> 4;
        fifth[run / 2] |= low << (4 * j + p) | high << (16 + 4 * j + p);
        pairs[run] |= low << (8 * hi + 2 * p) | high << (16 + 8 * hi + 2 * p);
      }
      words[(32 * (run / 2) + lane) * 4 + j] = word;
    }
    if (lane % 4 == 0) AddScales(quants, run, hi);
  }

  __device__ void AddScales(const QuantRun& quants, int run, int hi) {
    char* scales = stage + P::kScaleOffset;
    const int row = lane / 4 + 8 * hi;
    auto* halves = reinterpret_cast<uint16_t*>(scales);
    if constexpr (P::kHalves) {
      halves[row] = quants.scale;
      reinterpret_cast<uchar2*>(scales + 32)[16 * run + row] =
          make_uchar2(quants.sub_scales[0] + kSubScaleBias, quants.sub_scales[1] + kSubScaleBias);
    } else if constexpr (P::kIsK) {
      halves[2 * row] = quants.scale;
      halves[2 * row + 1] = quants.min;
      const uint32_t both = static_cast<uint32_t>(quants.sub_scales[0]) | quants.sub_min << 6;
      sub_scales[hi] |= uint64_t{both} << (12 * run);
    } else if constexpr (P::kHasMin) {
      halves[2 * ScaleIndex(run, row)] = quants.scale;
      halves[2 * ScaleIndex(run, row) + 1] = quants.min;
    } else {
      halves[ScaleIndex(run, row)] = quants.scale;
    }
  }

  __device__ void Finish() {
    if constexpr (P::kBits == 5) {
      auto* out = reinterpret_cast<uint32_t*>(stage + P::kHighOffset);
      for (int pair = 0; pair < 2; ++pair) out[32 * pair + lane] = fifth[pair];
    } else if constexpr (P::kBits == 6) {
      auto* out = reinterpret_cast<uint32_t*>(stage + P::kHighOffset);
      for (int run = 0; run < kRunsPerStage; ++run) {
        out[(32 * (run / 2) + lane) * 2 + run % 2] = pairs[run];
      }
    }
    if constexpr (P::kIsK && !P::kHalves) {
      if (lane % 4 != 0) return;
      char* scales = stage + P::kScaleOffset;
      for (int hi = 0; hi < 2; ++hi) {
        const int row = lane / 4 + 8 * hi;
        reinterpret_cast<uint32_t*>(scales + 64)[row] = static_cast<uint32_t>(sub_scales[hi]);
        reinterpret_cast<uint16_t*>(scales + 128)[row] =
            static_cast<uint16_t>(sub_scales[hi] >> 32);
      }
    }
  }
};

// A thread for every lane of every stage.
template <WeightType kType>
__global__ void PackKernel(const std::byte* source, int64_t num_rows, int cols, int64_t row_bytes,
                           int runs_per_block, int block_bytes, int num_stages, int64_t num_lanes,
                           char* out) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_lanes) return;
  const int stage = static_cast<int>(index / 32 % num_stages);
  const int64_t unit = index / 32 / num_stages;
  LanePacker<kType> packer{out + (unit * num_stages + stage) * PackedStage<kType>::kBytes,
                           static_cast<int>(index % 32)};
  for (int run = 0; run < kRunsPerStage; ++run) {
    for (int hi = 0; hi < 2; ++hi) {
      const int64_t row = unit * kUnitRows + packer.lane / 4 + 8 * hi;
      const int run_index = stage * kRunsPerStage + run;
      QuantRun quants = {};
      if (row < num_rows && run_index * kRunElements < cols) {
        quants = quant_decode::DecodeRunOfBlock(
            kType, source + row * row_bytes + int64_t{run_index / runs_per_block} * block_bytes,
            run_index % runs_per_block);
      }
      packer.Add(quants, run, hi);
    }
  }
  packer.Finish();
}

// Calls store(row 0..15, column of the stage, two neighbouring values) for what `lane` holds of a
// stage; the values are those of DequantizeRow to the last bit.
template <WeightType kType, typename Store>
__device__ __forceinline__ void DecodeLane(const char* stage, int lane, Store&& store) {
  using P = PackedStage<kType>;
  for (int pair = 0; pair < kRunsPerStage / 2; ++pair) {
    uint32_t quants[2][2][4];
    UnpackRunPair<kType>(stage, pair, lane, quants);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int hi = 0; hi < 2; ++hi) {
        const int row = lane / 4 + 8 * hi;
        const RunScale scale = LoadScale<kType>(stage, 2 * pair + r, row);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const uint32_t both = quants[r][hi][p] / (p % 2 == 1 ? P::kOddFactor : 1);
          float2 value = make_float2(SmallToFloat(both & 0xffff) - P::kTraits.offset,
                                     SmallToFloat(both >> 16) - P::kTraits.offset);
          value.x = __fmul_rn(scale.s[p / 2], value.x);
          value.y = __fmul_rn(scale.s[p / 2], value.y);
          if constexpr (P::kHasMin) {
            value.x = __fadd_rn(value.x, -scale.m);
            value.y = __fadd_rn(value.y, -scale.m);
          }
          store(row, kRunElements * (2 * pair + r) + ColumnOf<P::kHalves>(lane % 4, 2 * p), value);
        }
      }
    }
  }
}

template <WeightType kType>
__global__ void DequantizeKernel(const char* stages, int num_stages, int64_t num_lanes,
                                 int64_t num_rows, int cols, __nv_bfloat16* out) {
  WaitForEarlierKernels();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= num_lanes) return;
  const int stage = static_cast<int>(index / 32 % num_stages);
  const int64_t unit = index / 32 / num_stages;
  DecodeLane<kType>(stages + (unit * num_stages + stage) * PackedStage<kType>::kBytes,
                    static_cast<int>(index % 32), [&](int row_in_unit, int column, float2 value) {
                      const int64_t row = unit * kUnitRows + row_in_unit;
                      column += stage * kStageColumns;
                      if (row >= num_rows || column >= cols) return;
                      *reinterpret_cast<__nv_bfloat162*>(out + row * cols + column) =
                          __float22bfloat162_rn(value);
                    });
}

__device__ __forceinline__ void StorePair(void* row, int column, float2 value, bool is_bf16) {
  if (is_bf16) {
    static_cast<__nv_bfloat16*>(row)[column] = __float2bfloat16(value.x);
    static_cast<__nv_bfloat16*>(row)[column + 1] = __float2bfloat16(value.y);
  } else {
    static_cast<float*>(row)[column] = value.x;
    static_cast<float*>(row)[column + 1] = value.y;
  }
}

// A block for every token.
template <WeightType kType>
__global__ void EmbedQuantizedKernel(const char* stages, int num_stages, int cols,
                                     const int32_t* token_ids, char* out, int64_t out_row_bytes,
                                     bool out_is_bf16) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t token = token_ids[blockIdx.x];
  const char* unit = stages + token / kUnitRows * num_stages * PackedStage<kType>::kBytes;
  char* out_row = out + blockIdx.x * out_row_bytes;
  for (int stage = threadIdx.x / 32; stage < num_stages; stage += kThreads / 32) {
    DecodeLane<kType>(unit + int64_t{stage} * PackedStage<kType>::kBytes, threadIdx.x % 32,
                      [&](int row, int column, float2 value) {
                        column += stage * kStageColumns;
                        if (row == token % kUnitRows && column < cols) {
                          StorePair(out_row, column, value, out_is_bf16);
                        }
                      });
  }
}

__global__ void EmbedBF16Kernel(const __nv_bfloat16* table, int cols, const int32_t* token_ids,
                                char* out, int64_t out_row_bytes, bool out_is_bf16) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const __nv_bfloat16* row = table + int64_t{token_ids[blockIdx.x]} * cols;
  char* out_row = out + blockIdx.x * out_row_bytes;
  for (int i = 2 * threadIdx.x; i < cols; i += 2 * kThreads) {
    const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(row + i));
    StorePair(out_row, i, value, out_is_bf16);
  }
}

__global__ void BroadcastBiasKernel(const float* bias, void* y, int64_t y_stride, bool y_is_bf16,
                                    bool accumulate, int64_t m, int64_t n) {
  WaitForEarlierKernels();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= m * n) return;
  const int64_t at = index / n * y_stride + index % n;
  float value = bias[index % n];
  if (y_is_bf16) {
    auto* out = static_cast<__nv_bfloat16*>(y) + at;
    if (accumulate) value += __bfloat162float(*out);
    *out = __float2bfloat16(value);
  } else {
    auto* out = static_cast<float*>(y) + at;
    if (accumulate) value += *out;
    *out = value;
  }
}

}  // namespace

void ConvertToBF16(WeightType type, const void* source, void* out, int64_t num_elements,
                   cudaStream_t stream) {
  auto* to = static_cast<__nv_bfloat16*>(out);
  const dim3 grid(NumBlocks(num_elements));
  if (type == WeightType::kF32) {
    ConvertF32Kernel<<<grid, kThreads, 0, stream>>>(static_cast<const float*>(source), to,
                                                    num_elements);
  } else {
    GLOAM_CHECK(type == WeightType::kF16);
    ConvertF16Kernel<<<grid, kThreads, 0, stream>>>(static_cast<const __half*>(source), to,
                                                    num_elements);
  }
  GLOAM_CUDA_CHECK(cudaGetLastError());
}

int64_t PackedBytes(WeightType type, int64_t rows, int64_t cols) {
  int64_t bytes = 0;
  DispatchQuantized(type, [&]<WeightType kType>() {
    bytes = NumUnits(rows) * NumStages(cols) * PackedStage<kType>::kBytes;
  });
  return bytes;
}

void PackQuantized(WeightType type, const void* source, int64_t first_row, int64_t num_rows,
                   int64_t cols, void* out, cudaStream_t stream) {
  GLOAM_CHECK(first_row % kUnitRows == 0);
  const WeightTypeInfo& info = InfoOf(type);
  const int64_t num_lanes = NumUnits(num_rows) * NumStages(cols) * 32;
  char* to = static_cast<char*>(out) + PackedBytes(type, first_row, cols);
  DispatchQuantized(type, [&]<WeightType kType>() {
    PackKernel<kType><<<NumBlocks(num_lanes), kThreads, 0, stream>>>(
        static_cast<const std::byte*>(source), num_rows, static_cast<int>(cols),
        RowBytes(type, cols), info.block_elements / kRunElements, info.block_bytes,
        static_cast<int>(NumStages(cols)), num_lanes, to);
  });
  GLOAM_CUDA_CHECK(cudaGetLastError());
}

void Dequantize(const DeviceMatrix& matrix, int64_t first_row, int64_t num_rows, void* out,
                cudaStream_t stream) {
  GLOAM_CHECK(first_row % kUnitRows == 0 && matrix.format == DeviceFormat::kQuantized);
  const int64_t num_stages = NumStages(matrix.cols);
  const int64_t num_lanes = NumUnits(num_rows) * num_stages * 32;
  DispatchQuantized(matrix.type, [&]<WeightType kType>() {
    LaunchKernel(DequantizeKernel<kType>, {.grid = dim3(NumBlocks(num_lanes)), .block = kThreads},
                 stream,
                 static_cast<const char*>(matrix.data) +
                     first_row / kUnitRows * num_stages * PackedStage<kType>::kBytes,
                 static_cast<int>(num_stages), num_lanes, num_rows, static_cast<int>(matrix.cols),
                 static_cast<__nv_bfloat16*>(out));
  });
}

void EmbedRows(const DeviceMatrix& matrix, const int32_t* token_ids, int64_t num_tokens, void* out,
               int64_t out_stride, bool out_is_bf16, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(num_tokens), .block = kThreads};
  const int64_t out_row_bytes = out_stride * (out_is_bf16 ? 2 : 4);
  const int cols = static_cast<int>(matrix.cols);
  if (matrix.format == DeviceFormat::kBF16) {
    LaunchKernel(EmbedBF16Kernel, shape, stream, static_cast<const __nv_bfloat16*>(matrix.data),
                 cols, token_ids, static_cast<char*>(out), out_row_bytes, out_is_bf16);
    return;
  }
  GLOAM_CHECK(matrix.format == DeviceFormat::kQuantized);
  DispatchQuantized(matrix.type, [&]<WeightType kType>() {
    LaunchKernel(EmbedQuantizedKernel<kType>, shape, stream, static_cast<const char*>(matrix.data),
                 static_cast<int>(NumStages(cols)), cols, token_ids, static_cast<char*>(out),
                 out_row_bytes, out_is_bf16);
  });
}

void BroadcastBias(const float* bias, void* y, int64_t y_stride, bool y_is_bf16, bool accumulate,
                   int64_t m, int64_t n, cudaStream_t stream) {
  LaunchKernel(BroadcastBiasKernel, {.grid = dim3(NumBlocks(m * n)), .block = kThreads}, stream,
               bias, y, y_stride, y_is_bf16, accumulate, m, n);
}

}  // namespace gloam::cuda
