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

// The stages of both factors of a step.
struct StagePair {
  int a, b;
};

// sums = the products of `num_steps` stages of `a` and `b`, [..., 16 channels, stage]. next() waits
// for the stages of the next step and returns them; release(stages) once they have been read.
template <typename Mma, typename A, typename B, typename Sums, typename Next, typename Release>
__device__ __forceinline__ void MultiplyStages(Mma& mma, const A& a, const B& b, int num_steps,
                                               Sums& sums, const Next& next,
                                               const Release& release) {
  constexpr int kSlices = decltype(cute::size<2>(a))::value;
  mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  StagePair last;
  for (int step = 0; step < num_steps; ++step) {
    const StagePair at = next();
    cute::warpgroup_fence_operand(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      cute::gemm(mma, a(cute::_, cute::_, i, at.a), b(cute::_, cute::_, i, at.b), sums);
      mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (step > 0) release(last);
    last = at;
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(sums);
  release(last);
}

}  // namespace gloam::cuda
