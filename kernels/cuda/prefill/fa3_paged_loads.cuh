// What FlashInfer's FA3 kernel takes as its main loop: the producer warp's part, which brings query
// tiles, keys and values to shared memory. FlashInfer's own for paged caches gathers rows with a
// warp group of cp.async; a page of Gloam's cache is one run per head, so here a lane asks the copy
// engine for half a page (64 channels of 16 tokens), and the registers go to the multiplying warps.
#pragma once

#include <flashinfer/attention/hopper/prefill_sm90.cuh>

#include "kernels/cuda/prefill/fa3_epilogue.cuh"

namespace gloam::cuda {

template <typename Traits>
class PagedLoads {
 public:
  using T = typename Traits::DTypeKV;
  static constexpr int kTileRows = Traits::CTA_Q;
  static constexpr int kTileTokens = Traits::CTA_KV;
  static constexpr int kHeadDim = Traits::HEAD_DIM_QK;
  static constexpr int kPageTokens = 16;
  // 64 channels are 128 bytes, the width of a swizzled row in shared memory.
  static constexpr int kPieceChannels = 64;
  static constexpr int kPieces = kHeadDim / kPieceChannels;
  static constexpr int kPages = kTileTokens / kPageTokens;
  static constexpr int kPageBytes = kPageTokens * kHeadDim * sizeof(T);
  static_assert(kTileTokens % kPageTokens == 0 && kHeadDim % kPieceChannels == 0);
  static_assert(kPages * kPieces <= 32, "a copy per lane");

  // Names that the kernel and the multiplying warps look up.
  using MainloopPipeline = typename Traits::MainloopPipeline;
  using PipelineParams = typename MainloopPipeline::Params;
  using PipelineState = typename MainloopPipeline::PipelineState;
  using Epilogue = TileEpilogue<Traits>;
  using WarpScheduler = flashinfer::WarpScheduler<Traits, /*UseSchedulerBarrier=*/true>;
  static constexpr bool USE_TMA_LOAD_KV = true;
  static constexpr uint32_t TmaTransactionBytesK = kTileTokens * kHeadDim * sizeof(T);
  static constexpr uint32_t TmaTransactionBytesV = TmaTransactionBytesK;

  struct AdditionalParams {
    float sm_scale;
  };
  struct Params {
    CUtensorMap q;   // [num_tokens, num_heads, head_dim] in boxes of a tile's rows
    CUtensorMap kv;  // the cache as [num_rows, head_dim] in boxes of a page
    const T* cache;
    const int32_t* block_tables;
    int num_kv_heads;
    int num_rows;  // of the cache: a copy from there on gives zeros
    int window_left;
    AdditionalParams additional_params;
  };

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.kv);
  }

  // Tiles of tokens that a tile of queries sees, those before its window included.
  CUTLASS_DEVICE int get_num_kv_tiles(const Params&, int q_tile, int q_len, int kv_len) const {
    const int seen = min(kv_len, (q_tile + 1) * kTileRows + kv_len - q_len);
    return (seen + kTileTokens - 1) / kTileTokens;
  }

  // One tile of queries and all that it sees, last tokens first: K of a tile comes before V of the
  // tile after it. Called by one warp.
  template <bool kHasWindow, typename Coord, typename Scheduler, typename SharedStorage>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline keys, MainloopPipeline values,
                           PipelineState& keys_state, PipelineState& values_state,
                           SharedStorage& shared, Scheduler&, const typename Scheduler::Params&,
                           typename Scheduler::WorkTileInfo&, const Coord& coord, int work_index) {
    using flashinfer::NamedBarriers;
    const auto [q_tile, q_head, kv_head, q_begin, table_begin, q_len, kv_len, unused] = coord;
    const Context context = {params.block_tables + table_begin, kv_len, kv_head};
    int tile = get_num_kv_tiles(params, q_tile, q_len, kv_len) - 1;
    const int first_tile = !kHasWindow
                               ? 0
                               : flashinfer::get_swa_begin_kv_tile_idx<kTileRows, kTileTokens>(
                                     params.window_left, q_tile, q_len, kv_len);
    int block = BlockOf(context, tile);
    int next_block = BlockOf(context, tile - 1);

    keys.producer_acquire(keys_state);
    Copy(params, context, block, 0, keys.producer_get_barrier(keys_state),
         TileAt(shared.smem_k.data(), keys_state));
    ++keys_state;

    // The query's memory is free once the multiplying warps have done the tile before.
    cutlass::arch::NamedBarrier::sync(Traits::NUM_MMA_THREADS + Traits::NUM_PRODUCER_THREADS,
                                      static_cast<int>(NamedBarriers::kQueryEmpty));
    if (cute::elect_one_sync()) {
      shared.barrier_Q.arrive_and_expect_tx(kTileRows * kHeadDim * sizeof(T));
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        cute::SM90_TMA_LOAD_3D::copy(&params.q, reinterpret_cast<uint64_t*>(&shared.barrier_Q),
                                     static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     shared.smem_q.data() + piece * kTileRows * kPieceChannels,
                                     piece * kPieceChannels, q_head, q_begin + q_tile * kTileRows);
      }
    }
    __syncwarp();
    if (work_index > 0) shared.results_read.Wait(work_index - 1);  // they lie where values will

    if (kv_len % kPageTokens != 0 && (tile + 1) * kTileTokens > kv_len) {
      // The tile has a page whose rows are not all the context's.
      if (tile > first_tile) {
        CopyTile(params, context, next_block, 0, keys, keys_state, shared.smem_k.data());
      }
      CopyLastValues(params, context, tile, block, values, values_state, shared);
      if (tile == first_tile) return;
      --tile;
      block = next_block;
      next_block = BlockOf(context, tile - 1);
    }
    for (; tile > first_tile; --tile) {
      const int after_next = BlockOf(context, tile - 2);
      CopyTile(params, context, next_block, 0, keys, keys_state, shared.smem_k.data());
      CopyTile(params, context, block, 1, values, values_state, shared.smem_v.data());
      block = next_block;
      next_block = after_next;
    }
    CopyTile(params, context, block, 1, values, values_state, shared.smem_v.data());
  }

  // Before the thread block ends: waits until keys and values are not read any more.
  CUTLASS_DEVICE void load_tail(MainloopPipeline keys, MainloopPipeline values,
                                PipelineState& keys_state, PipelineState& values_state) {
    keys.producer_tail(keys_state);
    values.producer_tail(values_state);
  }

 private:
  struct Context {
    const int32_t* table;
    int kv_len;
    int kv_head;
  };

  // A lane's page and piece of any tile.
  CUTLASS_DEVICE static int Page() { return threadIdx.x % 32 % kPages; }
  CUTLASS_DEVICE static int Piece() { return threadIdx.x % 32 / kPages; }

  // The block of the lane's page of a tile; -1 for a page without tokens.
  CUTLASS_DEVICE static int BlockOf(const Context& context, int tile) {
    const int page = tile * kPages + Page();
    return tile >= 0 && page * kPageTokens < context.kv_len ? context.table[page] : -1;
  }

  CUTLASS_DEVICE static T* TileAt(T* tiles, const PipelineState& state) {
    return tiles + state.index() * (kTileTokens * kHeadDim);
  }

  // Row of the cache's matrix where the lane's page begins. A block's keys of all heads come before
  // its values.
  CUTLASS_DEVICE static int RowOf(const Params& params, const Context& context, int block,
                                  int is_values) {
    if (block < 0) return params.num_rows;
    return ((2 * block + is_values) * params.num_kv_heads + context.kv_head) * kPageTokens;
  }

  CUTLASS_DEVICE static void Copy(const Params& params, const Context& context, int block,
                                  int is_values, uint64_t* barrier, T* to) {
    if (Piece() >= kPieces) return;
    // Tiles are swizzled as the multiplying warps expect them: pieces of all rows, one by one.
    cute::SM90_TMA_LOAD_2D::copy(
        &params.kv, barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
        to + (Piece() * kTileTokens + Page() * kPageTokens) * kPieceChannels,
        Piece() * kPieceChannels, RowOf(params, context, block, is_values));
  }

  // Keys or values of the next tile of `pipeline`, whose ring of tiles is at `tiles`.
  CUTLASS_DEVICE static void CopyTile(const Params& params, const Context& context, int block,
                                      int is_values, MainloopPipeline& pipeline,
                                      PipelineState& state, T* tiles) {
    pipeline.producer_acquire(state);
    Copy(params, context, block, is_values, pipeline.producer_get_barrier(state),
         TileAt(tiles, state));
    ++state;
  }

  // Values of a tile whose last page is not full. What lies behind the context may be NaN, which a
  // probability of zero does not cancel: the warp stores that page itself, with zeros there.
  template <typename SharedStorage>
  CUTLASS_DEVICE static void CopyLastValues(const Params& params, const Context& context, int tile,
                                            int block, MainloopPipeline& values,
                                            PipelineState& state, SharedStorage& shared) {
    constexpr int kChunk = 8;  // elements of 16 bytes
    constexpr int kRowChunks = kHeadDim / kChunk;
    const int page = context.kv_len / kPageTokens - tile * kPages;
    const int num_rows = context.kv_len % kPageTokens;
    const int lane = threadIdx.x % 32;
    const int first_row = RowOf(params, context, __shfl_sync(~0u, block, page), 1);
    while (values.producer_try_acquire(state) != cutlass::BarrierStatus::WaitDone) {
    }
    T* to = TileAt(shared.smem_v.data(), state);
#pragma unroll
    for (int i = lane; i < kPageTokens * kRowChunks; i += 32) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      uint4 x = {};
      if (row < num_rows) {
        const int64_t from = (int64_t{first_row} + row) * kHeadDim + chunk * kChunk;
        x = *reinterpret_cast<const uint4*>(params.cache + from);
      }
      const int to_row = chunk / 8 * kTileTokens + page * kPageTokens + row;
      const int to_chunk = (chunk ^ row) % 8;
      *reinterpret_cast<uint4*>(to + to_row * kPieceChannels + to_chunk * kChunk) = x;
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();

    values.producer_acquire(state);  // expects the bytes of a whole tile
    uint64_t* barrier = values.producer_get_barrier(state);
    if (Page() != page) Copy(params, context, block, 1, barrier, to);
    if (lane == 0) {
      cutlass::arch::ClusterTransactionBarrier::complete_transaction(barrier, 0, kPageBytes);
    }
    ++state;
  }
};

}  // namespace gloam::cuda
