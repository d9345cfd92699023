// Asynchronous copies from global to shared memory: what their users share. Each issues the copies
// themselves as it needs them.
#pragma once

#include <cstdint>

namespace gloam::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Closes a group of the copies that this thread has asked for.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// All but the latest kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace gloam::cuda
