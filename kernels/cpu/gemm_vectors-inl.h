// Vectors of the matrix kernels, once per instruction set: lanes are rows of a panel.
#include "hwy/highway.h"
#include "kernels/cpu/packed_weight.h"

#ifndef GLOAM_UNROLL
#if defined(__clang__)
#define GLOAM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GLOAM_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

#if defined(GLOAM_GEMM_VECTORS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_GEMM_VECTORS_INL_H
#undef GLOAM_GEMM_VECTORS_INL_H
#else
#define GLOAM_GEMM_VECTORS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// A vector holds kLanes of the panel's 16 rows; wider panels are done in kLanes-wide strips.
using DF = hn::CappedTag<float, kPanelRows>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using VU = hn::Vec<DU>;
constexpr DF df;
constexpr DI di;
constexpr DU du;
constexpr int kLanes = hn::MaxLanes(df);

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
