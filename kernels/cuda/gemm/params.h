// What the kernels behind GemmBackend (gemm_backend.cc) take, and the functions that launch them.
// All pointers are on the device; everything is enqueued on the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/weight.h"

namespace gloam::cuda {

// Layout of a weight on the device: bf16 row-major [rows, cols], or 16-row panels of one GGUF type
// (packed_weight.cuh), or fp8 (e4m3) panels with an fp32 scale per row.
enum class DeviceFormat : uint8_t { kBF16, kQuantized, kFP8 };

struct DeviceMatrix {
  DeviceFormat format = DeviceFormat::kBF16;
  WeightType type = WeightType::kBF16;  // of kQuantized
  const void* data = nullptr;
  const float* row_scales = nullptr;  // [rows], of kFP8
  int64_t rows = 0;
  int64_t cols = 0;
};

// One of the matrices that a launch multiplies by; they share format, type and columns.
struct GemmSegment {
  const void* weight = nullptr;
  const float* row_scales = nullptr;  // of kFP8
  const float* bias = nullptr;        // [rows] or null
  void* y = nullptr;                  // [m, rows], fp32 or bf16
  int64_t y_stride = 0;
  int rows = 0;
  int first_unit = 0;  // units of 16 rows in the segments before this one
  bool y_is_bf16 = false;
  bool accumulate = false;
};

// Above this many rows of x the tiled kernel replaces passes of the streaming one (of quantised
// weights where same_sums is set).
inline constexpr int kMaxStreamedRows = 64;

struct StreamGemmParams {
  static constexpr int kMaxSegments = 3;

  const void* x = nullptr;  // [m, k], bf16, rows 16-byte aligned
  int64_t x_stride = 0;
  int m = 0;
  int k = 0;  // a multiple of 32
  GemmSegment segments[kMaxSegments];
  int num_segments = 0;
  int num_units = 0;
};

inline constexpr int kUnitRows = 16;

struct StreamGemmDevice {
  int num_sms = 0;
  int max_shared_bytes = 0;   // of a block
  bool has_clusters = false;  // of blocks: compute capability 9.0
  bool same_sums = false;     // a row's bits may not depend on how many rows there are
  cudaStream_t stream = nullptr;
};

// stream_*.cu: y = x W^T; for few rows at the rate at which the device reads the weights, more
// take several passes or other kernels. The order of every sum depends on k and the format alone,
// with quantised weights only where same_sums is set.
void StreamGemmBF16(const StreamGemmParams& params, const StreamGemmDevice& device);
void StreamGemmQuantized(WeightType type, const StreamGemmParams& params,
                         const StreamGemmDevice& device);

// cluster_quantized.cu: for more rows; needs has_clusters.
void ClusterGemmQuantized(WeightType type, const StreamGemmParams& params,
                          const StreamGemmDevice& device);

void StreamGemmFP8(const StreamGemmParams& params, const StreamGemmDevice& device);

// pack.cu. Source rows are as in a file; `first_row` is where they go in the stacked weight.
void ConvertToBF16(WeightType type, const void* source, void* out, int64_t num_elements,
                   cudaStream_t stream);
int64_t PackedBytes(WeightType type, int64_t rows, int64_t cols);
// `first_row` is a multiple of 16; the rows after the last up to the next multiple become zeros.
void PackQuantized(WeightType type, const void* source, int64_t first_row, int64_t num_rows,
                   int64_t cols, void* out, cudaStream_t stream);
// Rows [first_row, first_row + num_rows), first_row a multiple of 16, as bf16 [num_rows, cols].
void Dequantize(const DeviceMatrix& matrix, int64_t first_row, int64_t num_rows, void* out,
                cudaStream_t stream);
// out[i] = row token_ids[i], fp32 or bf16.
void EmbedRows(const DeviceMatrix& matrix, const int32_t* token_ids, int64_t num_tokens, void* out,
               int64_t out_stride, bool out_is_bf16, cudaStream_t stream);
// The same of e4m3 weights, made of F32, F16 and BF16: stream_fp8.cu.
int64_t FP8Bytes(int64_t rows, int64_t cols);
void PackFP8(WeightType type, const void* source, int64_t first_row, int64_t num_rows, int64_t cols,
             void* out, float* row_scales, cudaStream_t stream);
void DequantizeFP8(const DeviceMatrix& matrix, int64_t first_row, int64_t num_rows, void* out,
                   cudaStream_t stream);
void EmbedFP8(const DeviceMatrix& matrix, const int32_t* token_ids, int64_t num_tokens, void* out,
              int64_t out_stride, bool out_is_bf16, cudaStream_t stream);

// y = bias or y += bias, [m, n]: before a product that adds to y.
void BroadcastBias(const float* bias, void* y, int64_t y_stride, bool y_is_bf16, bool accumulate,
                   int64_t m, int64_t n, cudaStream_t stream);

}  // namespace gloam::cuda
