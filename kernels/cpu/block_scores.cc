#include "kernels/cpu/block_scores.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/cpu/estimate_kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/estimate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/block_scores.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Heads that share one conversion of a range to fp32.
constexpr int kHeadTile = 4;
// Blocks that share a load of the queries.
constexpr int kBlockTile = 2;
// Blocks are anywhere in the cache: their ranges are asked for this far ahead.
constexpr int64_t kPrefetchBlocks = 16;

inline VF LoadRange(const float* from) { return hn::LoadU(DF(), from); }
template <typename T>
inline VF LoadRange(const T* from) {
  return hn::PromoteTo(DF(), hn::LoadU(hn::Rebind<T, DF>(), from));
}

// What a query's channels multiply minima and maxima by. With the whole range counted, negative
// channels meet the minima alone and the others the maxima.
struct RangeQuery {
  alignas(64) float of_min[kMaxSidecarHeadDim];
  alignas(64) float of_max[kMaxSidecarHeadDim];
};

// Scores of kBlocks blocks for kHeads heads: scores[h * stride + blocks[b]].
template <int kHeads, int kBlocks, typename T>
HWY_INLINE void ScoreTile(const BlockScores& work, const RangeQuery* queries, const int64_t* blocks,
                          float* HWY_RESTRICT scores, int64_t stride) {
  const DF d;
  const T* ranges[kBlocks];
  VF sums[kHeads][kBlocks];
  HWY_UNROLL(2)
  for (int b = 0; b < kBlocks; ++b) {
    ranges[b] = reinterpret_cast<const T*>(work.keys.Ranges(blocks[b]));
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) sums[h][b] = hn::Zero(d);
  }
  for (int c = 0; c < work.head_dim; c += kLanes) {
    VF min[kBlocks], max[kBlocks];
    HWY_UNROLL(2)
    for (int b = 0; b < kBlocks; ++b) {
      min[b] = LoadRange(ranges[b] + c);
      max[b] = LoadRange(ranges[b] + work.head_dim + c);
    }
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) {
      const VF of_min = hn::Load(d, queries[h].of_min + c);
      const VF of_max = hn::Load(d, queries[h].of_max + c);
      HWY_UNROLL(2)
      for (int b = 0; b < kBlocks; ++b) {
        sums[h][b] = hn::MulAdd(of_max, max[b], hn::MulAdd(of_min, min[b], sums[h][b]));
      }
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(2)
    for (int b = 0; b < kBlocks; ++b) {
      scores[h * stride + blocks[b]] = hn::GetLane(hn::SumOfLanes(d, sums[h][b]));
    }
  }
}

// Scores of kBlocks blocks for all heads.
template <int kBlocks, typename T>
void ScoreAllHeads(const BlockScores& work, const RangeQuery* queries, const int64_t* blocks) {
  const int64_t stride = work.keys.num_blocks * kBlockTokens;
  for (int head = 0; head < work.num_heads; head += kHeadTile) {
    const RangeQuery* of_tile = queries + head;
    float* scores = work.scores + head * stride;
    switch (std::min(kHeadTile, work.num_heads - head)) {
      case 1:
        ScoreTile<1, kBlocks, T>(work, of_tile, blocks, scores, stride);
        break;
      case 2:
        ScoreTile<2, kBlocks, T>(work, of_tile, blocks, scores, stride);
        break;
      case 3:
        ScoreTile<3, kBlocks, T>(work, of_tile, blocks, scores, stride);
        break;
      default:
        ScoreTile<kHeadTile, kBlocks, T>(work, of_tile, blocks, scores, stride);
        break;
    }
  }
}

template <typename T>
void ScoreBlocksOf(const BlockScores& work) {
  const int64_t end = std::min(work.end_block, work.keys.num_blocks);
  const int64_t range_bytes = int64_t{2} * work.head_dim * static_cast<int64_t>(sizeof(T));
  RangeQuery queries[kMaxGroupHeads];
  const float near = 0.5f * (1 + work.range_weight);  // the share of the end that the sign favours
  const float far = 0.5f * (1 - work.range_weight);
  for (int head = 0; head < work.num_heads; ++head) {
    for (int c = 0; c < work.head_dim; ++c) {
      const float q = work.queries[head * work.head_dim + c];
      queries[head].of_min[c] = q * (q < 0 ? near : far);
      queries[head].of_max[c] = q * (q < 0 ? far : near);
    }
  }
  int64_t tile[kBlockTile];
  int count = 0;
  for (int64_t block = work.begin_block; block < end; ++block) {
    if (block + kPrefetchBlocks < end) {
      PrefetchRange(work.keys.Ranges(block + kPrefetchBlocks), range_bytes);
    }
    if (!HasCandidate(work.masks, work.num_heads, work.keys.num_blocks, block)) continue;
    tile[count++] = block;
    if (count < kBlockTile) continue;
    ScoreAllHeads<kBlockTile, T>(work, queries, tile);
    count = 0;
  }
  if (count > 0) ScoreAllHeads<1, T>(work, queries, tile);
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

void ScoreBlocks(const BlockScores& work) {
  const int head_dim = work.head_dim;
  GLOAM_CHECK(head_dim > 0 && head_dim % 16 == 0 && head_dim == work.keys.kv.layout.head_dim);
  GLOAM_CHECK(head_dim <= kMaxSidecarHeadDim && work.num_heads <= kMaxGroupHeads);
  GLOAM_CHECK(IsKvDType(work.keys.kv.layout.dtype));
  HWY_DYNAMIC_DISPATCH(ScoreBlocksTarget)(work);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
