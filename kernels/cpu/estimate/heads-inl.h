// What all estimators do over query heads, once per instruction set: tiles of them, and sums over
// channels.
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/estimate/integer_weights.h"
#include "kernels/cpu/vectors-inl.h"

#if defined(GLOAM_ESTIMATE_HEADS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ESTIMATE_HEADS_INL_H
#undef GLOAM_ESTIMATE_HEADS_INL_H
#else
#define GLOAM_ESTIMATE_HEADS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// Calls f(first_head, std::integral_constant<int, heads>) for tiles of up to kTileHeads heads.
template <typename F>
void ForHeadTiles(int num_heads, const F& f) {
  int head = 0;
  for (; head + kTileHeads <= num_heads; head += kTileHeads) {
    f(head, std::integral_constant<int, kTileHeads>());
  }
  switch (num_heads - head) {
    case 3:
      return f(head, std::integral_constant<int, 3>());
    case 2:
      return f(head, std::integral_constant<int, 2>());
    case 1:
      return f(head, std::integral_constant<int, 1>());
    default:
      return;
  }
}

// out[i] = the fold of the N * kLanes values x[i][*], in an order that does not depend on kLanes:
// of four neighbours (0, 2) and (1, 3), then the fours in ascending order.
template <int N, typename Op>
HWY_INLINE void FoldFour(const Op& op, const VF (&x)[4][N], float* out) {
  constexpr int kFours = N * kLanes / 4;
  alignas(64) float fours[kFours][4];
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) {
    for (int at = 0; at < kFours; ++at) {
      const VF* v = x[i] + 4 * at;
      fours[at][i] = hn::GetLane(op(op(v[0], v[2]), op(v[1], v[3])));
    }
  }
  for (int i = 0; i < 4; ++i) {
    VF total = hn::Set(df, fours[0][i]);
    for (int at = 1; at < kFours; ++at) total = op(total, hn::Set(df, fours[at][i]));
    out[i] = hn::GetLane(total);
  }
#else
  const hn::Repartition<uint64_t, DF> d64;
  GLOAM_UNROLL
  for (int s = 0; s < N; ++s) {
    const auto pair = [&](VF a, VF b) HWY_ATTR {
      return hn::BitCast(d64, op(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b)));
    };
    const auto ab = pair(x[0][s], x[1][s]);
    const auto cd = pair(x[2][s], x[3][s]);
    const VF abcd = op(hn::BitCast(df, hn::InterleaveLower(d64, ab, cd)),
                       hn::BitCast(df, hn::InterleaveUpper(d64, ab, cd)));
    hn::Store(abcd, df, fours[s * kLanes / 4]);
  }
  const hn::CappedTag<float, 4> d4;
  auto total = hn::Load(d4, fours[0]);
  GLOAM_UNROLL
  for (int at = 1; at < kFours; ++at) total = op(total, hn::Load(d4, fours[at]));
  hn::StoreU(total, d4, out);
#endif
}

struct AddOp {
  template <typename V>
  V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};
struct MaxOp {
  template <typename V>
  V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
