// The inner loops of matrix products and of the embedding, in the best instruction set of the host
// (Highway's run-time dispatch). Every function handles one panel of 16 output rows and runs on the
// calling thread; the order of operations for one output element depends on nothing but K.
#pragma once

#include <cstdint>

#include "kernels/cpu/packed_weight.h"

namespace gloam::cpu {

// What the int8 product needs to know about 32 consecutive activations of a row.
struct ActivationBlock {
  float scale = 0;            // x[i] is about scale * quants[i]
  float scaled_sum = 0;       // scale * sum of the quants
  int32_t half_sums[2] = {};  // sums of the first and last 16 quants
};

// Rows of activations as int8.
struct QuantizedRows {
  const int8_t* quants = nullptr;           // [num_rows, cols]
  const ActivationBlock* blocks = nullptr;  // [num_rows, cols / 32]
  int64_t cols = 0;

  QuantizedRows Skip(int64_t rows) const {
    return {quants + rows * cols, blocks + rows * (cols / kRunElements), cols};
  }
};

// Where a panel's results go.
struct PanelOutput {
  float* y = nullptr;           // [num_rows, num_cols]
  int64_t row_stride = 0;       // in elements
  int num_cols = 0;             // 16, or fewer in the last panel
  const float* bias = nullptr;  // [num_cols] or null
  bool accumulate = false;
};

// Most rows of activations per call; bounds the stack that a call uses.
inline constexpr int kMaxRowsPerCall = 128;

// Quantises one row: scale = max |x| / 127 per 32 elements, rounded to nearest, in [-127, 127].
void QuantizeRow(const float* x, int64_t cols, int8_t* quants, ActivationBlock* blocks);

// y = x W^T over a panel of a quantised weight, `num_rows` <= kMaxRowsPerCall rows of activations.
// Per run of 32 columns, ascending: an exact int32 dot product, then in fp32
// sum = fma(dot, weight_scale * activation_scale, sum) and, for types with a min,
// sum = fma(weight_min, activation_scaled_sum, sum).
void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PanelOutput& out);

// The same with fp32 activations and a weight of any type: sum = fma(weight, x, sum), columns
// ascending.
void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out);

// Dequantises one row of the weight: out is [cols].
void UnpackRow(const PackedWeight& weight, int64_t row, float* out);

// Makes the AVX-512 kernels do without VNNI, so that a test on a newer host covers that path.
void DisableVnniForTest(bool disable);

}  // namespace gloam::cpu
