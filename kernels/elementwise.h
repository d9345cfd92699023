// Row-wise operations between the matrix products. All tensors have the backend's activation
// dtype (fp32 on the CPU) unless said otherwise; sums are taken in fp32, in a fixed order that
// does not depend on the number of rows.
#pragma once

#include "kernels/tensor_view.h"
#include "kernels/weight.h"

namespace gloam {

struct EmbedParams {
  const Weight* table = nullptr;       // [vocab_size, hidden_size]
  const int32_t* token_ids = nullptr;  // [num_tokens], each in [0, vocab_size)
  TensorView out;                      // [num_tokens, hidden_size]
};

// out = x / sqrt(mean(x^2) + eps) * weight, per row. In place (out == x) is allowed.
// With [num_tokens, num_heads, head_dim] it normalises each head (Qwen3's QK norm).
struct RmsNormParams {
  TensorView x;                   // [num_rows, dim] or [num_rows, heads, dim]
  const float* weight = nullptr;  // [dim]
  float eps = 1e-5f;
  TensorView out;  // same shape as x
};

// out = silu(gate) * up. In place (out == gate) is allowed.
struct SiluMulParams {
  TensorView gate;  // [num_tokens, intermediate_size]
  TensorView up;    // same
  TensorView out;   // same
};

// Copies rows: out[i] = x[row_indices[i]].
struct GatherRowsParams {
  TensorView x;                          // [num_tokens, dim]
  const int32_t* row_indices = nullptr;  // [num_rows]
  TensorView out;                        // [num_rows, dim]
};

}  // namespace gloam
