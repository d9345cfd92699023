// The inner loops of matrix products and of the embedding, in the best instruction set of the host
// (Highway's run-time dispatch). Every function handles one panel of 16 output rows and runs on the
// calling thread; the order of operations for one output element depends on nothing but K.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cpu/gemm/packed_weight.h"

namespace gloam::cpu {

// Rows of activations as int8, in groups of `group_rows` rows (the last group may have fewer), so
// that a register tile finds what it needs of a run of 32 columns at fixed distances.
//   A run of a group, R = group_rows: int8 quants[R][32], float scale[R], float scaled_sum[R],
//   int32 offset[R], int32 half_offset[R].
//   x[i] is about scale * quants[i]; scaled_sum = scale * sum of the quants; the offsets are -128
//   times the sums of all 32 quants and of the first 16.
struct QuantizedRows {
  static constexpr int kBytesPerRun = kRunElements + 16;  // and row

  std::byte* data = nullptr;  // [groups][runs][group_rows * kBytesPerRun]
  int64_t num_runs = 0;
  int group_rows = 0;

  // From a row that begins a group.
  QuantizedRows Skip(int64_t rows) const {
    return {data + rows * num_runs * kBytesPerRun, num_runs, group_rows};
  }
};

// Rows in a group: as many as fit a register tile, or all where they are fewer than these.
inline constexpr int kRowGroup = 8;
inline constexpr int kFewRows = 4;

// The largest result of each row so far and its column, the first among equals. NaN counts as minus
// infinity, infinity as the largest number.
struct LargestResults {
  float* values = nullptr;     // [num_rows]; null: there are none
  int32_t* columns = nullptr;  // [num_rows]

  // A result of the first row.
  void Take(float value, int32_t column) const {
    value = std::min(value, std::numeric_limits<float>::max());
    if (value > *values || (value == *values && column < *columns)) {
      *values = value;
      *columns = column;
    }
  }
  // From a row on.
  LargestResults Skip(int64_t rows) const { return {values + rows, columns + rows}; }
};

// Where a panel's results go: to y, or to what is `largest`.
struct PanelOutput {
  float* y = nullptr;           // [num_rows, num_cols]; half the rows if `precise`
  int64_t row_stride = 0;       // in elements
  int num_cols = 0;             // 16, or fewer in the last panel
  const float* bias = nullptr;  // [num_cols] or null
  bool accumulate = false;
  bool precise = false;    // activations' rows 2i and 2i + 1 are row i and its residual
  LargestResults largest;  // of activations that are not
};

// Most rows of activations per call; bounds the stack that a call uses.
inline constexpr int kMaxRowsPerCall = 128;

// Quantises a row into row `row` of `out`: scale = max |x| / 127 per 32 elements, rounded to
// nearest, in [-127, 127]. With `precise`, what that leaves of x becomes row + 1 in the same way.
void QuantizeRow(const float* x, bool precise, const QuantizedRows& out, int64_t row);

// y = x W^T over a panel of a quantised weight, `num_rows` <= kMaxRowsPerCall rows of activations.
// Per run of 32 columns, ascending: an exact int32 dot product, then in fp32
// sum = fma(dot, weight_scale * activation_scale, sum) and, for types with a min,
// sum = fma(weight_min, activation_scaled_sum, sum). With `out.precise`, the sums of a row and of
// its residual are added at the end. Asks meanwhile for `next`, what this thread reads next.
void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PackedBytes& next, const PanelOutput& out);

// The same with fp32 activations and a weight of any type: sum = fma(weight, x, sum), columns
// ascending.
void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out);

// Dequantises one row of the weight: out is [cols].
void UnpackRow(const PackedWeight& weight, int64_t row, float* out);

}  // namespace gloam::cpu
