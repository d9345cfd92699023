// Launches FlashInfer's FA3 kernel for paged prefill with work items from plan.cc and loads of
// Gloam's own. One kernel per cache type and head_dim is compiled, which serves windows too.
// FlashInfer's FA2 headers cannot be in the same file.
#pragma once

#include <limits>

#include "base/check.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/prefill/fa3.h"
#include "kernels/cuda/prefill/fa3_paged_loads.cuh"
#include "kernels/cuda/tensor_map.h"

namespace gloam::cuda {

template <typename T, int kHeadDim>
void RunFa3(const Fa3Params& params) {
  // Tiles of query rows (plan.h: Fa3TileRows) by 128 tokens, in two stages.
  using KernelTraits =
      flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/true, kHeadDim, kHeadDim,
                                        /*CTA_Q=*/kHeadDim == 64 ? 192 : 128, /*CTA_KV=*/128,
                                        /*NUM_STAGES=*/2, T, T, cutlass::bfloat16_t, int32_t,
                                        flashinfer::StandardAttention>;
  using Traits = TileTraits<KernelTraits>;
  using Loads = PagedLoads<Traits>;
  using Epilogue = typename Loads::Epilogue;
  using Scheduler = flashinfer::BatchPrefillPersistentTileScheduler<int32_t>;
  const auto kernel =
      flashinfer::PrefillWithKVCacheKernel<Loads, Epilogue, Traits, /*LEFT_SLIDING_WINDOW=*/true,
                                           /*CAUSAL=*/true, Scheduler>;
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);

  typename Loads::Params loads = {};
  loads.q = MakeTensorMap<3>(params.q, {kHeadDim, params.num_heads, params.num_tokens},
                             {params.q_head_stride, params.q_token_stride},
                             {Loads::kPieceChannels, 1, Loads::kTileRows});
  const int64_t num_rows = params.num_blocks * 2 * params.num_kv_heads * Loads::kPageTokens;
  GLOAM_CHECK(num_rows > 0 && num_rows < std::numeric_limits<int32_t>::max());
  loads.kv = MakeTensorMap<2>(params.cache, {kHeadDim, num_rows}, {kHeadDim},
                              {Loads::kPieceChannels, Loads::kPageTokens});
  loads.cache = static_cast<const T*>(params.cache);
  loads.block_tables = params.block_tables;
  loads.num_kv_heads = params.num_kv_heads;
  loads.num_rows = static_cast<int>(num_rows);
  // The kernel knows no "all": a window that no context fills, far enough from overflow.
  loads.window_left =
      params.window_left >= 0 ? params.window_left : std::numeric_limits<int>::max() / 2;
  loads.additional_params.sm_scale = params.scale;

  const int num_tokens = static_cast<int>(params.num_tokens);
  const auto epilogue = Epilogue::to_underlying_arguments(
      {static_cast<cutlass::bfloat16_t*>(params.out),
       flashinfer::get_gmem_layout(num_tokens, params.num_heads, kHeadDim,
                                   int64_t{params.num_heads} * kHeadDim, kHeadDim),
       nullptr, flashinfer::get_lse_gmem_layout(num_tokens, params.num_heads)});
  const auto ids = [](const int32_t* array) { return const_cast<int32_t*>(array); };
  const auto schedule = Scheduler::to_underlying_arguments(
      {ids(params.work_begins), ids(params.work_heads), ids(params.work_tiles),
       ids(params.work_q_begins), ids(params.work_table_begins), ids(params.work_q_lens),
       ids(params.work_kv_lens), ids(params.work_tiles),  // the last is read and used for nothing
       cutlass::FastDivmod(params.num_heads / params.num_kv_heads), params.num_heads});
  GLOAM_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<params.num_thread_blocks, Traits::NUM_WARPS * 32, kSharedBytes, params.stream>>>(
      loads, epilogue, schedule);
  GLOAM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace gloam::cuda
