#include "kernels/cpu/block_scores.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/cpu/prefetch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/block_scores.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

#ifndef GLOAM_BLOCK_SCORES_ONCE
#define GLOAM_BLOCK_SCORES_ONCE
namespace gloam::cpu {

struct BlockScores {
  KeyBlocks keys;
  const float* queries;
  int num_heads;
  int head_dim;
  const TokenMask* masks;
  float* scores;

  bool HasCandidate(int64_t block) const {
    for (int head = 0; head < num_heads; ++head) {
      if (masks[head * keys.num_blocks + block] != 0) return true;
    }
    return false;
  }
};

}  // namespace gloam::cpu
#endif  // GLOAM_BLOCK_SCORES_ONCE

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Heads that share one conversion of a range to fp32.
constexpr int kHeadTile = 4;
// Blocks are anywhere in the cache: their ranges are asked for this far ahead.
constexpr int64_t kPrefetchBlocks = 16;

inline VF LoadRange(const float* from) { return hn::LoadU(DF(), from); }
template <typename T>
inline VF LoadRange(const T* from) {
  return hn::PromoteTo(DF(), hn::LoadU(hn::Rebind<T, DF>(), from));
}

// Scores of one block for kHeads heads.
template <int kHeads, typename T>
HWY_INLINE void ScoreHeads(const T* HWY_RESTRICT minima, const float* HWY_RESTRICT queries,
                           int head_dim, float* HWY_RESTRICT scores, int64_t score_stride) {
  const DF d;
  const T* HWY_RESTRICT maxima = minima + head_dim;
  VF sums[kHeads];
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) sums[h] = hn::Zero(d);
  for (int c = 0; c < head_dim; c += kLanes) {
    const VF min = LoadRange(minima + c);
    const VF max = LoadRange(maxima + c);
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      const VF q = hn::LoadU(d, queries + h * head_dim + c);
      // Not IfNegativeThenElse: Highway 1.0.3 takes the bare sign for a full mask on SSSE3.
      const VF corner = hn::IfThenElse(hn::Lt(q, hn::Zero(d)), min, max);
      sums[h] = hn::MulAdd(q, corner, sums[h]);
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    scores[h * score_stride] = hn::GetLane(hn::SumOfLanes(d, sums[h]));
  }
}

template <typename T>
void ScoreBlocksOf(const BlockScores& work) {
  const int64_t num_blocks = work.keys.num_blocks;
  const int64_t stride = num_blocks * kBlockTokens;
  const int d = work.head_dim;
  const int64_t range_bytes = int64_t{2} * d * static_cast<int64_t>(sizeof(T));
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (block + kPrefetchBlocks < num_blocks) {
      PrefetchRange(work.keys.Ranges(block + kPrefetchBlocks), range_bytes);
    }
    if (!work.HasCandidate(block)) continue;
    const T* ranges = reinterpret_cast<const T*>(work.keys.Ranges(block));
    for (int head = 0; head < work.num_heads; head += kHeadTile) {
      const float* queries = work.queries + head * d;
      float* scores = work.scores + head * stride + block;
      switch (std::min(kHeadTile, work.num_heads - head)) {
        case 1:
          ScoreHeads<1>(ranges, queries, d, scores, stride);
          break;
        case 2:
          ScoreHeads<2>(ranges, queries, d, scores, stride);
          break;
        case 3:
          ScoreHeads<3>(ranges, queries, d, scores, stride);
          break;
        default:
          ScoreHeads<kHeadTile>(ranges, queries, d, scores, stride);
          break;
      }
    }
  }
}

void ScoreBlocksTarget(const BlockScores& work) {
  switch (work.keys.kv.layout.dtype) {
    case DType::kBF16:
      return ScoreBlocksOf<hwy::bfloat16_t>(work);
    case DType::kF16:
      return ScoreBlocksOf<hwy::float16_t>(work);
    default:  // kF32: ScoreBlocks has checked
      return ScoreBlocksOf<float>(work);
  }
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(ScoreBlocksTarget);

void ScoreBlocks(const KeyBlocks& keys, const float* queries, int num_heads, int head_dim,
                 const TokenMask* masks, float* scores) {
  GLOAM_CHECK(head_dim > 0 && head_dim % 16 == 0 && head_dim == keys.kv.layout.head_dim);
  GLOAM_CHECK(IsKvDType(keys.kv.layout.dtype));
  HWY_DYNAMIC_DISPATCH(ScoreBlocksTarget)({keys, queries, num_heads, head_dim, masks, scores});
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
