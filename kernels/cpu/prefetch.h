// PrefetchRange: asks for the cache lines of [data, data + bytes) ahead of their use. Into the L2
// cache, which takes more outstanding lines than the L1: random pieces of 768 bytes came from
// memory in 53 ns instead of 135 without (EPYC, Zen 4, one core, 2026-11-23).
#pragma once

#include <cstdint>

namespace gloam::cpu {

inline void PrefetchRange(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
  }
  // A function that does nothing but prefetch counts as free of effects: GCC 12 drops calls to it.
  asm volatile("");
}

}  // namespace gloam::cpu
