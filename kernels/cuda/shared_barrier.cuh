// A barrier in shared memory at which some threads of a thread block arrive and others wait.
// compute-sanitizer's racecheck knows what it orders, which it does not of `bar.arrive`, nor of one
// thread's arrival for a warp.
#pragma once

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"

namespace gloam::cuda {

class SharedBarrier {
 public:
  // By one thread; a barrier of the thread block must follow. A phase ends with `count` arrivals.
  __device__ __forceinline__ void Init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(&state_)), "r"(count)
                 : "memory");
  }

  // After all that the thread has read and written.
  __device__ __forceinline__ void Arrive() {
    asm volatile(
        "{\n"
        ".reg .b64 state;\n"
        "mbarrier.arrive.shared.b64 state, [%0];\n"
        "}\n" ::"r"(SharedAddress(&state_))
        : "memory");
  }

  // Waits for the end of phase `phase`, counted from 0; of the phases before, only the last may be
  // unfinished then.
  __device__ __forceinline__ void Wait(int phase) {
#if __CUDA_ARCH__ >= 900
#define GLOAM_MBARRIER_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define GLOAM_MBARRIER_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again%=:\n" GLOAM_MBARRIER_WAIT
        " done, [%0], %1;\n"
        "@!done bra again%=;\n"
        "}\n" ::"r"(SharedAddress(&state_)),
        "r"(phase & 1)
        : "memory");
#undef GLOAM_MBARRIER_WAIT
  }

 private:
  alignas(8) uint64_t state_;
};

}  // namespace gloam::cuda
