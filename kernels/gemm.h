// Matrix products with model weights: y = x W^T (+ bias) (+ residual).
// Several weights that share an input run as one operation, so that the input is quantised once
// and the threads (or the GPU) see one large piece of work.
//
// Order of summation: every output element is computed by the same sequence of operations whatever
// the number of rows, so an answer does not depend on batch, chunking or recomputation.
#pragma once

#include <array>

#include "kernels/tensor_view.h"
#include "kernels/weight.h"

namespace gloam {

struct GemmOutput {
  const Weight* weight = nullptr;  // [n, k]
  const float* bias = nullptr;     // [n] or null
  TensorView y;                    // [m, n], rows may be strided
  bool accumulate = false;         // y += x W^T instead of y = (the residual connection)
};

struct GemmParams {
  static constexpr int kMaxOutputs = 3;  // Q, K, V

  TensorView x;  // [m, k], rows may be strided
  std::array<GemmOutput, kMaxOutputs> outputs;
  int num_outputs = 0;
  // Where a backend quantises activations, it keeps twice the bits of these. For inputs whose
  // rounding shows most in the answer; costs a second pass of products.
  bool precise = false;
};

// Greedy sampling's logits: of each row of x W^T a few elements, the first of the largest among
// them, and which they are.
struct GreedyLogitsParams {
  TensorView x;                    // [m, k], rows may be strided
  const Weight* weight = nullptr;  // [n, k]
  TensorView y;                    // [m, n] fp32, contiguous: memory for the result
};

// The feed-forward network's first half: y = silu(x W_gate^T) * (x W_up^T).
struct GatedGemmParams {
  TensorView x;                    // [m, k], rows may be strided
  const Weight* weight = nullptr;  // [2 n, k]: the gate's rows, then the up's
  TensorView y;                    // [m, n], rows may be strided; not x
};

}  // namespace gloam
