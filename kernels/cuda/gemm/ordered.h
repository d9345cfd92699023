// Products with bf16 weights: all of batch-invariant mode, those of a decode batch's rows in any
// (compute capability 9.0 alone). Host side of the GEMM backend; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/gemm/plain_product.h"
#include "kernels/sample.h"

namespace gloam::cuda {

// W of no more rows is summed in two parts, where y is fp32.
inline constexpr int kMaxPartedRows = 5120;

// y = x w^T (+ bias) (+ y) for any number of rows of x. The order of the sums depends on w's shape
// and y's type: a row's bits depend on nothing but the row and w. k is a multiple of 8, rows of x
// are 16-byte aligned.
void MultiplyOrdered(const PlainProduct& product, int num_sms, cudaStream_t stream);

// y = silu(x w_gate^T) * (x w_up^T) with the same sums. w: 2 n rows, the gate's, then the up's; n
// is a multiple of 8; y bf16, its rows 4-byte aligned; no bias, nothing added.
void MultiplyOrderedGated(const PlainProduct& product, int num_sms, cudaStream_t stream);

// W of fewer rows has no greedy logits of its own: candidates would be as many as the logits.
inline constexpr int kMinGreedyRows = 2 * kMaxPartedRows;

// The largest of each row of x w^T, with the same sums as MultiplyOrdered's of a fp32 y; at most
// 256 rows of x, w of kMinGreedyRows at least. The result lies in y's memory: values, -infinity
// where a part of w has no row, and behind them the rows of w that they belong to.
LogitRows FindLargest(const PlainProduct& product, int num_sms, cudaStream_t stream);

}  // namespace gloam::cuda
