// A product with bf16 operands and fp32 sums, as cuBLASLt and the kernels of its kind take it.
#pragma once

#include <cstdint>

namespace gloam::cuda {

// y = x w^T (+ bias) (+ y).
struct PlainProduct {
  const void* x = nullptr;  // [m, k], bf16
  int64_t x_stride = 0;
  const void* w = nullptr;  // [n, k], bf16, contiguous
  void* y = nullptr;        // [m, n]
  int64_t y_stride = 0;
  const float* bias = nullptr;  // [n] or null
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool y_is_bf16 = false;
  bool accumulate = false;
};

}  // namespace gloam::cuda
