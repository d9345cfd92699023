// Launches FlashInfer's FA2 kernels for paged prefill without its planner and dispatcher: work
// items come from plan.cc, and only the kernels that can run are compiled. FlashInfer's FA3 headers
// cannot be in the same file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/variants.cuh>
#include <flashinfer/page.cuh>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/prefill/fa2.h"

namespace gloam::cuda {

// What FlashInfer's kernel reads, under the names that it expects.
template <typename T>
struct Fa2KernelParams {
  using DTypeQ = T;
  using DTypeKV = T;
  using DTypeO = __nv_bfloat16;
  using IdType = int32_t;

  DTypeQ* q;
  flashinfer::paged_kv_t<DTypeKV, IdType> paged_kv;
  IdType* q_indptr;  // [num_seqs]
  DTypeO* o;
  float* lse;
  flashinfer::uint_fastdiv group_size;
  IdType q_stride_n;
  IdType q_stride_h;
  uint32_t k_sf_stride_page;
  uint32_t k_sf_stride_n;
  uint32_t k_sf_stride_h;
  uint32_t v_sf_stride_page;
  uint32_t v_sf_stride_n;
  uint32_t v_sf_stride_h;
  int32_t window_left;
  float sm_scale;
  IdType* request_indices;
  IdType* qo_tile_indices;
  IdType* kv_tile_indices;
  IdType* o_indptr;  // [num_seqs]
  bool* block_valid_mask;
  IdType* kv_chunk_size_ptr;
  bool partition_kv;
  const IdType* q_lens;
  const IdType* kv_lens;

  __host__ __device__ uint32_t get_qo_len(uint32_t seq) const { return q_lens[seq]; }
  __host__ __device__ uint32_t get_kv_len(uint32_t seq) const { return kv_lens[seq]; }
};

template <typename T, uint32_t kHeadDim>
Fa2KernelParams<T> MakeFa2KernelParams(const Fa2Params& params) {
  const auto ids = [](const int32_t* array) { return const_cast<int32_t*>(array); };
  constexpr uint32_t kPageTokens = 16;
  const int64_t page_elements = int64_t{2} * params.num_kv_heads * kPageTokens * kHeadDim;
  const int64_t strides[3] = {page_elements, kPageTokens * kHeadDim, kHeadDim};

  Fa2KernelParams<T> kernel_params{};
  kernel_params.q = static_cast<T*>(const_cast<void*>(params.q));
  kernel_params.paged_kv = flashinfer::paged_kv_t<T, int32_t>(
      params.num_kv_heads, kPageTokens, kHeadDim, params.num_seqs, flashinfer::QKVLayout::kHND,
      static_cast<T*>(const_cast<void*>(params.keys)),
      static_cast<T*>(const_cast<void*>(params.values)), strides, ids(params.block_tables),
      ids(params.table_begins), /*last_page_len=*/nullptr);
  kernel_params.q_indptr = ids(params.q_begins);
  kernel_params.o = static_cast<__nv_bfloat16*>(params.out);
  kernel_params.lse = params.lse;
  kernel_params.group_size = flashinfer::uint_fastdiv(params.num_heads / params.num_kv_heads);
  kernel_params.q_stride_n = static_cast<int32_t>(params.q_token_stride);
  kernel_params.q_stride_h = static_cast<int32_t>(params.q_head_stride);
  kernel_params.window_left = params.window_left;
  kernel_params.sm_scale = params.scale;
  kernel_params.request_indices = ids(params.work_seqs);
  kernel_params.qo_tile_indices = ids(params.work_tiles);
  kernel_params.kv_tile_indices = ids(params.work_pieces);
  kernel_params.o_indptr = ids(params.out_begins);
  kernel_params.kv_chunk_size_ptr = ids(params.piece_tokens);
  kernel_params.partition_kv = params.split;
  kernel_params.q_lens = params.q_lens;
  kernel_params.kv_lens = params.kv_lens;
  return kernel_params;
}

// kKvMmas: 16-token steps of the context that a thread block holds at once.
template <typename T, uint32_t kHeadDim, uint32_t kTileRows, uint32_t kKvMmas>
using Fa2Traits = flashinfer::KernelTraits<
    flashinfer::MaskMode::kCausal, kTileRows, kTileRows / 64, kKvMmas, kHeadDim / 16, kHeadDim / 16,
    /*NUM_WARPS_Q=*/4, /*NUM_WARPS_KV=*/1, flashinfer::PosEncodingMode::kNone, T, T, __nv_bfloat16,
    float, int32_t,
    flashinfer::DefaultAttention</*use_custom_mask=*/false, /*use_sliding_window=*/true,
                                 /*use_logits_soft_cap=*/false, /*use_alibi=*/false>,
    /*ENABLE_FP4_REPACK=*/false>;

template <typename Traits, typename KernelParams>
void LaunchFa2(const Fa2Params& params, const KernelParams& kernel_params) {
  static_assert(!Traits::IsInvalid());
  constexpr auto kKernel = flashinfer::BatchPrefillWithPagedKVCacheKernel</*SAME_KV_STRIDES=*/true,
                                                                          Traits, KernelParams>;
  constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStoragePaged);
  static const cudaError_t limit_raised = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  GLOAM_CUDA_CHECK(limit_raised);
  LaunchKernel(kKernel,
               {.grid = dim3(params.num_works, 1, params.num_kv_heads),
                .block = dim3(32, Traits::NUM_WARPS_Q, Traits::NUM_WARPS_KV),
                .shared_bytes = kSharedBytes},
               params.stream, kernel_params);
}

// The largest step of the context of which two thread blocks fit on a multiprocessor.
template <typename T, uint32_t kHeadDim, uint32_t kTileRows, uint32_t kLargeKvMmas>
void RunFa2Tile(const Fa2Params& params) {
  using Large = Fa2Traits<T, kHeadDim, kTileRows, kLargeKvMmas>;
  const Fa2KernelParams<T> kernel_params = MakeFa2KernelParams<T, kHeadDim>(params);
  if constexpr (kHeadDim > 64) {  // 64 fits everywhere
    if (2 * sizeof(typename Large::SharedStoragePaged) >
        static_cast<size_t>(params.max_shared_bytes)) {
      LaunchFa2<Fa2Traits<T, kHeadDim, kTileRows, kLargeKvMmas / 2>>(params, kernel_params);
      return;
    }
  }
  LaunchFa2<Large>(params, kernel_params);
}

template <typename T, uint32_t kHeadDim>
void RunFa2(const Fa2Params& params) {
  if (params.tile_rows == 128) {
    RunFa2Tile<T, kHeadDim, 128, 4>(params);
  } else {
    RunFa2Tile<T, kHeadDim, 64, 8>(params);
  }
}

}  // namespace gloam::cuda
