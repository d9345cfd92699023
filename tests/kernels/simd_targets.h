// ForEachSimdTarget: runs a check with every instruction set of this machine.
#pragma once

#include <cstdint>

#include "catch2/catch.hpp"
#include "kernels/cpu/simd_targets.h"

#include "hwy/targets.h"

namespace gloam::cpu {

namespace internal {
// Chooses one target (0: the best again) for all that Highway dispatches at run time.
inline void ChooseSimdTarget(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}
struct RestoreSimdTargets {
  ~RestoreSimdTargets() { ChooseSimdTarget(0); }
};
}  // namespace internal

// Calls f once for every SIMD target; a failed check in it names the target.
template <typename F>
void ForEachSimdTarget(const F& f) {
  const internal::RestoreSimdTargets restore;
  for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
    internal::ChooseSimdTarget(left & -left);
    CAPTURE(hwy::TargetName(left & -left));
    f();
  }
}

}  // namespace gloam::cpu
