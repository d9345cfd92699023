// What FlashInfer's FA3 kernel takes as its epilogue: a tile's results go through shared memory,
// where values were and will be, to their rows. FlashInfer's own lets a warp read results as soon
// as half of the warps have stored theirs (each is counted twice at one barrier), and one warp that
// has read its share tells the producer to overwrite them all; under racecheck results were wrong.
#pragma once

#include <flashinfer/attention/hopper/prefill_sm90.cuh>

#include "kernels/cuda/shared_barrier.cuh"

namespace gloam::cuda {

// FlashInfer's traits, with a barrier for what follows.
template <typename Base>
struct TileTraits : Base {
  struct SharedStorage : Base::SharedStorage {
    SharedBarrier results_read;  // a phase per tile
  };
};

template <typename Traits>
class TileEpilogue : public flashinfer::CollectiveEpilogue<Traits> {
  using Base = flashinfer::CollectiveEpilogue<Traits>;

 public:
  // The kernel makes one in every thread, before all meet for the first time.
  CUTLASS_DEVICE TileEpilogue() {
    extern __shared__ char shared_memory[];
    auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
    if (threadIdx.x == 0) shared.results_read.Init(Base::NUM_MMA_THREADS);
  }

  // Called by all multiplying threads.
  template <typename Coord, typename Storage, typename Sums, typename Lse, typename Mma>
  CUTLASS_DEVICE void store(const typename Base::Params& params, const Sums& sums, const Lse&,
                            Storage& shared, Mma mma, int thread, const Coord& coord) {
    const auto [q_tile, q_head, kv_head, q_begin, table_begin, q_len, kv_len, unused] = coord;
    const auto results =
        cute::make_tensor(cute::make_smem_ptr(shared.smem_o.data()), typename Base::SmemLayoutO{});
    const auto rounded = flashinfer::convert_type<typename Base::DTypeO>(sums);
    const auto to_shared = cute::make_tiled_copy_C(typename Base::SmemCopyAtomO{}, mma);
    const auto own = to_shared.get_thread_slice(thread);
    Sync();  // all have read the values
    cute::copy(to_shared, own.retile_S(rounded), own.partition_D(results));
    Sync();  // all results are there
    flashinfer::write_O<Base::NUM_COPY_THREADS>(
        params.O_ptr, typename Base::TiledCopyO{}, params.layout_O,
        cute::select<0, 1>(typename Base::TileShape_PDV{}), results, thread, q_tile, q_head,
        q_begin, q_len, /*write_warp_idx=*/0);
    // Not by another named barrier: of warps that meet at several racecheck (2025.3) reports, in
    // some runs, accesses that a bar.sync of all of them stands between.
    shared.results_read.Arrive();
  }

 private:
  // After CUTLASS's own.
  static constexpr int kValueBarrier =
      static_cast<int>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier) +
      static_cast<int>(flashinfer::NamedBarriers::kValueEmpty);

  // All multiplying threads. Unlike CUTLASS's, nothing that reads or writes memory may move across.
  CUTLASS_DEVICE static void Sync() {
    asm volatile("bar.sync %0, %1;" ::"r"(kValueBarrier), "r"(Base::NUM_MMA_THREADS) : "memory");
  }
};

}  // namespace gloam::cuda
