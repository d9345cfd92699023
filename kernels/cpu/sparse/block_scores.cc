#include "kernels/cpu/sparse/block_scores.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/cpu/estimate/kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_targets.h"
#include "kernels/estimate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sparse/block_scores.cc"
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
// Blocks that share a load of the queries, and the additions across lanes.
constexpr int kBlockTile = 4;
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

// sums[i] = the sum of the lanes of x[i].
HWY_INLINE void SumLanes(const VF (&x)[kBlockTile], float* sums) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < kBlockTile; ++i) sums[i] = hn::GetLane(x[i]);
#else
  const DF d;
  const hn::Repartition<uint64_t, DF> d64;
  const auto halves = [&](VF a, VF b) HWY_ATTR {  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
    return hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto a = halves(x[0], x[1]);
  const auto b = halves(x[2], x[3]);
  const VF quads = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, a, b)),
                           hn::BitCast(d, hn::InterleaveUpper(d64, a, b)));
  // Lane i of each 128-bit block: of x[i].
  const hn::CappedTag<float, 4> d4;
  alignas(64) float blocks[kLanes];
  hn::Store(quads, d, blocks);
  auto total = hn::Load(d4, blocks);
  HWY_UNROLL(4)
  for (int i = 4; i < kLanes; i += 4) total = hn::Add(total, hn::Load(d4, blocks + i));
  hn::StoreU(total, d4, sums);
#endif
}

// Scores of a tile of blocks for kHeads heads: scores[h * stride + blocks[b]].
template <int kHeads, typename T>
HWY_INLINE void ScoreTile(const BlockScores& work, const RangeQuery* queries, const int64_t* blocks,
                          float* HWY_RESTRICT scores, int64_t stride) {
  const DF d;
  const T* ranges[kBlockTile];
  VF sums[kHeads][kBlockTile];
  HWY_UNROLL(4)
  for (int b = 0; b < kBlockTile; ++b) {
    ranges[b] = reinterpret_cast<const T*>(work.keys.Ranges(blocks[b]));
    HWY_UNROLL(4)
    for (int h = 0; h < kHeads; ++h) sums[h][b] = hn::Zero(d);
  }
  for (int c = 0; c < work.head_dim; c += kLanes) {
    HWY_UNROLL(4)
    for (int b = 0; b < kBlockTile; ++b) {
      const VF min = LoadRange(ranges[b] + c);
      const VF max = LoadRange(ranges[b] + work.head_dim + c);
      HWY_UNROLL(4)
      for (int h = 0; h < kHeads; ++h) {
        sums[h][b] = hn::MulAdd(hn::Load(d, queries[h].of_min + c), min, sums[h][b]);
        sums[h][b] = hn::MulAdd(hn::Load(d, queries[h].of_max + c), max, sums[h][b]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int h = 0; h < kHeads; ++h) {
    alignas(16) float of_head[kBlockTile];
    SumLanes(sums[h], of_head);
    HWY_UNROLL(4)
    for (int b = 0; b < kBlockTile; ++b) scores[h * stride + blocks[b]] = of_head[b];
  }
}

// Scores of a tile of blocks for all heads.
template <typename T>
void ScoreAllHeads(const BlockScores& work, const RangeQuery* queries, const int64_t* blocks) {
  const int64_t stride = work.keys.num_blocks * kBlockTokens;
  for (int head = 0; head < work.num_heads; head += kHeadTile) {
    const RangeQuery* of_tile = queries + head;
    float* scores = work.scores + head * stride;
    switch (std::min(kHeadTile, work.num_heads - head)) {
      case 1:
        ScoreTile<1, T>(work, of_tile, blocks, scores, stride);
        break;
      case 2:
        ScoreTile<2, T>(work, of_tile, blocks, scores, stride);
        break;
      case 3:
        ScoreTile<3, T>(work, of_tile, blocks, scores, stride);
        break;
      default:
        ScoreTile<kHeadTile, T>(work, of_tile, blocks, scores, stride);
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
  // The blocks behind the last one are likely this thread's next.
  int64_t fetched = work.begin_block;
  const auto fetch_until = [&](int64_t block) {
    for (; fetched < std::min(block, work.keys.num_blocks); ++fetched) {
      PrefetchRange(work.keys.Ranges(fetched), range_bytes);
    }
  };
  fetch_until(work.begin_block + kPrefetchBlocks);
  int64_t tile[kBlockTile];
  int count = 0;
  for (int64_t block = work.begin_block; block < end; ++block) {
    fetch_until(block + kPrefetchBlocks + 1);
    if (!HasCandidate(work.masks, work.num_heads, work.keys.num_blocks, block)) continue;
    tile[count++] = block;
    if (count < kBlockTile) continue;
    ScoreAllHeads<T>(work, queries, tile);
    count = 0;
  }
  if (count == 0) return;
  std::fill(tile + count, tile + kBlockTile, tile[0]);
  ScoreAllHeads<T>(work, queries, tile);
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
  GLOAM_CHECK(IsKvDType(work.keys.kv.layout.dtype, Device::kCpu));
  HWY_DYNAMIC_DISPATCH(ScoreBlocksTarget)(work);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
