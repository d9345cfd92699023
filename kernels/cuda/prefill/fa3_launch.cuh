// Launches FlashInfer's FA3 kernels for paged prefill without its planner and dispatcher: work
// items come from plan.cc, and one kernel per cache type and head_dim is compiled, which serves
// windows too. FlashInfer's FA2 headers cannot be in the same file.
#pragma once

#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>
#include <limits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/prefill/fa3.h"

namespace gloam::cuda {

// What FlashInfer's launcher reads, under the names that it expects.
template <typename T>
struct Fa3KernelParams {
  using DTypeQ = T;
  using DTypeKV = T;
  using DTypeO = cutlass::bfloat16_t;
  using IdType = int32_t;

  DTypeQ* q_ptr;
  DTypeKV* k_ptr;
  DTypeKV* v_ptr;
  DTypeO* o_ptr;
  float* lse_ptr;
  IdType* qo_tile_indices;
  IdType* qo_indptr;
  IdType* kv_indptr;
  IdType* kv_indices;
  IdType* qo_lens;
  IdType* kv_lens;
  IdType* head_indices;
  IdType* work_indptr;
  IdType* batch_indices;
  struct AdditionalParams {
    float sm_scale;
  } additional_params;
  int64_t q_stride_n;
  int64_t k_stride_n;
  int64_t v_stride_n;
  int64_t o_stride_n;
  int64_t q_stride_h;
  int64_t k_stride_h;
  int64_t v_stride_h;
  int64_t o_stride_h;
  int64_t nnz_qo;
  int64_t k_page_stride;
  int64_t v_page_stride;
  int num_qo_heads;
  int num_kv_heads;
  int page_size;
  int window_left;
};

template <typename T, int kHeadDim>
void RunFa3(const Fa3Params& params) {
  // Tiles of query rows (plan.h: Fa3TileRows) by 96 tokens, in two stages: FlashInfer's choice.
  using Traits =
      flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/false, kHeadDim, kHeadDim,
                                        /*CTA_Q=*/kHeadDim == 64 ? 192 : 128, /*CTA_KV=*/96,
                                        /*NUM_STAGES=*/2, T, T, cutlass::bfloat16_t, int32_t,
                                        flashinfer::StandardAttention>;
  const auto ids = [](const int32_t* array) { return const_cast<int32_t*>(array); };
  constexpr int kPageTokens = 16;
  const int64_t page_elements = int64_t{2} * params.num_kv_heads * kPageTokens * kHeadDim;

  Fa3KernelParams<T> kernel_params{};
  kernel_params.q_ptr = static_cast<T*>(const_cast<void*>(params.q));
  kernel_params.k_ptr = static_cast<T*>(const_cast<void*>(params.keys));
  kernel_params.v_ptr = static_cast<T*>(const_cast<void*>(params.values));
  kernel_params.o_ptr = static_cast<cutlass::bfloat16_t*>(params.out);
  kernel_params.qo_tile_indices = ids(params.work_tiles);
  kernel_params.qo_indptr = ids(params.work_q_begins);
  kernel_params.kv_indptr = ids(params.work_table_begins);
  kernel_params.kv_indices = ids(params.block_tables);
  kernel_params.qo_lens = ids(params.work_q_lens);
  kernel_params.kv_lens = ids(params.work_kv_lens);
  kernel_params.head_indices = ids(params.work_heads);
  kernel_params.work_indptr = ids(params.work_begins);
  kernel_params.batch_indices = ids(params.work_tiles);  // read, and used for nothing here
  kernel_params.additional_params.sm_scale = params.scale;
  kernel_params.q_stride_n = params.q_token_stride;
  kernel_params.q_stride_h = params.q_head_stride;
  kernel_params.k_stride_n = kHeadDim;
  kernel_params.k_stride_h = kPageTokens * kHeadDim;
  kernel_params.v_stride_n = kernel_params.k_stride_n;
  kernel_params.v_stride_h = kernel_params.k_stride_h;
  kernel_params.o_stride_n = int64_t{params.num_heads} * kHeadDim;
  kernel_params.o_stride_h = kHeadDim;
  kernel_params.nnz_qo = params.num_tokens;
  kernel_params.k_page_stride = page_elements;
  kernel_params.v_page_stride = page_elements;
  kernel_params.num_qo_heads = params.num_heads;
  kernel_params.num_kv_heads = params.num_kv_heads;
  kernel_params.page_size = kPageTokens;
  // The kernel knows no "all": a window that no context fills, far enough from overflow.
  kernel_params.window_left =
      params.window_left >= 0 ? params.window_left : std::numeric_limits<int>::max() / 2;
  GLOAM_CUDA_CHECK((flashinfer::BatchPrefillWithPagedKVCacheKernelTraitsDispatched<
                    Traits, /*LEFT_SLIDING_WINDOW=*/true, /*CAUSAL=*/true,
                    /*SAME_SCHEDULE_FOR_ALL_HEADS=*/false>(kernel_params, params.stream)));
}

}  // namespace gloam::cuda
