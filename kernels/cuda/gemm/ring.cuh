// Warp groups that multiply out of a ring of stages in shared memory, which the copy engine fills
// (compute capability 9.0 alone).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

namespace gloam::cuda {

// Where in the ring, and how often it went round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// sums = the products of `num_steps` stages of `a` and `b`, [..., 16 channels, stage], from `at`
// on. A stage is awaited by its barrier of `full`; release(stage) once it has been read.
template <int kStages, typename Mma, typename A, typename B, typename Sums, typename Release>
__device__ __forceinline__ void MultiplyStages(Mma& mma, const A& a, const B& b,
                                               cutlass::arch::ClusterTransactionBarrier* full,
                                               int num_steps, RingPosition<kStages>& at, Sums& sums,
                                               const Release& release) {
  constexpr int kSlices = decltype(cute::size<2>(a))::value;
  mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  int last_stage = -1;
  for (int step = 0; step < num_steps; ++step) {
    full[at.stage].wait(at.phase);
    cute::warpgroup_fence_operand(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      cute::gemm(mma, a(cute::_, cute::_, i, at.stage), b(cute::_, cute::_, i, at.stage), sums);
      mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (last_stage >= 0) release(last_stage);
    last_stage = at.stage;
    at.Advance();
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(sums);
  release(last_stage);
}

}  // namespace gloam::cuda
