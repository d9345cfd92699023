#include "kernels/cpu/sparse/token_scan.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <limits>
#include <utility>

#include "kernels/cpu/simd_targets.h"
#include "kernels/cpu/sparse/scan_keys.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sparse/token_scan.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using MI = hn::Mask<DI>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Lanes whose bit is set in the low bits of `mask`.
inline MI LanesOf(uint32_t mask) {
  alignas(64) static constexpr int32_t kBits[kBlockTokens] = {
      1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return hn::TestBit(hn::Set(DI(), static_cast<int32_t>(mask)), hn::Load(DI(), kBits));
}

inline uint32_t BitsOf(MI lanes) {
  uint8_t bytes[8] = {};
  hn::StoreMaskBits(DI(), lanes, bytes);
  return bytes[0] | uint32_t{bytes[1]} << 8;
}

// Writes the values of `lanes` to `to`, where a whole vector has room; returns their number.
inline int64_t StoreCompressed(VI values, MI lanes, int32_t* to) {
  const DI di;
  if constexpr (kLanes == 4 || kLanes == 8) {
    // Not Compress: with Highway 1.0.3, GCC 12 copies its table onto the stack at every call.
    const uint32_t bits = BitsOf(lanes);
    const auto order = hn::IndicesFromVec(di, hn::LoadU(di, kSetBits.rows[bits]));
    hn::StoreU(hn::TableLookupLanes(values, order), di, to);
    return std::popcount(bits);
  } else {
    hn::StoreU(hn::Compress(values, lanes), di, to);
    return static_cast<int64_t>(hn::CountTrue(di, lanes));
  }
}

// Calls f(index of the first lane's token, lanes that count) for each vector with a token.
template <typename F>
HWY_INLINE void ForEachVector(const TokenMask* masks, int64_t num_blocks, const F& f) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    const uint32_t mask = masks[block];
    if (mask == 0) continue;
    for (int lane = 0; lane < kBlockTokens; lane += kLanes) {
      f(block * kBlockTokens + lane, LanesOf(mask >> lane));
    }
  }
}

// Sum of floats in double, in two vectors: of the lower and of the upper lanes.
#if HWY_TARGET == HWY_SCALAR
struct DoubleSum {
  double sum = 0;
  void Add(VF x) { sum += static_cast<double>(hn::GetLane(x)); }
  double Total() const { return sum; }
};
#else
struct DoubleSum {
  using DD = hn::Repartition<double, DF>;
  hn::Vec<DD> low;
  hn::Vec<DD> high;

  HWY_INLINE DoubleSum() : low(hn::Zero(DD())), high(hn::Zero(DD())) {}
  HWY_INLINE void Add(VF x) {
    const hn::Half<DF> half;
    low = hn::Add(low, hn::PromoteTo(DD(), hn::LowerHalf(half, x)));
    high = hn::Add(high, hn::PromoteTo(DD(), hn::UpperHalf(half, x)));
  }
  HWY_INLINE double Total() const { return hn::GetLane(hn::SumOfLanes(DD(), hn::Add(low, high))); }
};
#endif  // HWY_TARGET == HWY_SCALAR

inline VF LoadFinite(const float* from) {
  const DF d;
  const VF x = hn::LoadU(d, from);
  const VF lowest = hn::Set(d, -FLT_MAX);
  return hn::IfThenElse(hn::IsNaN(x), lowest, hn::Max(hn::Min(x, hn::Set(d, FLT_MAX)), lowest));
}

inline VI LoadKeys(const float* from) {
  const DF d;
  const DI di;
  const VF x = hn::LoadU(d, from);
  const VI bits = hn::BitCast(di, hn::Add(x, hn::Zero(d)));  // -0 becomes 0
  const VI key = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), hn::Set(di, 0x7fffffff)));
  return hn::IfThenElse(hn::RebindMask(di, hn::IsNaN(x)),
                        hn::Set(di, std::numeric_limits<int32_t>::min()), key);
}

// exp(x) for x <= 0; 0 below -87. Relative error at most 2^-23 * (1 - x): the product with 1 / ln 2
// is rounded once. Less than half of the instructions of Highway's, which is exact to the last bit.
inline VF ExpOfNegative(VF x) {
  const DF d;
  const DI di;
  // x / ln 2 = an integer and a fraction in [-1/2, 1/2]; adding the bias rounds.
  const VF bias = hn::Set(d, 0x1.8p23f);
  const VF scaled = hn::Mul(x, hn::Set(d, 1.44269504f));
  const VF biased = hn::Add(scaled, bias);
  const VF f = hn::Sub(scaled, hn::Sub(biased, bias));
  // 2^f, exactly 1 at 0: the polynomial of degree 5 with the least relative error there, 9.2e-8.
  VF y = hn::MulAdd(f, hn::Set(d, 1.32647271e-3f), hn::Set(d, 9.67151264e-3f));
  y = hn::MulAdd(f, y, hn::Set(d, 5.55073374e-2f));
  y = hn::MulAdd(f, y, hn::Set(d, 2.40222421e-1f));
  y = hn::MulAdd(f, y, hn::Set(d, 6.93146978e-1f));
  y = hn::MulAdd(f, y, hn::Set(d, 1.0f));
  // The bias's bits are shifted out.
  const VI exponent = hn::ShiftLeft<23>(hn::BitCast(di, biased));
  const VF power = hn::BitCast(d, hn::Add(hn::BitCast(di, y), exponent));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -87.0f)), power);
}

float MaxOfTarget(const float* values, const TokenMask* masks, int64_t num_blocks) {
  const DF d;
  const VF lowest = hn::Set(d, -FLT_MAX);
  VF max = lowest;
  ForEachVector(masks, num_blocks, [&](int64_t at, MI lanes) HWY_ATTR {
    max = hn::Max(max, hn::IfThenElse(hn::RebindMask(d, lanes), LoadFinite(values + at), lowest));
  });
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

double ExpWeightsTarget(const float* logits, const TokenMask* masks, int64_t num_blocks, float max,
                        float* weights) {
  const DF d;
  const VF reference = hn::Set(d, max);
  DoubleSum sum;
  for (int64_t block = 0; block < num_blocks; ++block) {
    float* out = weights + block * kBlockTokens;
    if (masks[block] == 0) {
      std::fill_n(out, kBlockTokens, 0.0f);
      continue;
    }
    for (int lane = 0; lane < kBlockTokens; lane += kLanes) {
      const VF logit = LoadFinite(logits + block * kBlockTokens + lane);
      VF weight = ExpOfNegative(hn::Sub(logit, reference));
      if (masks[block] != kAllTokens) {
        const MI lanes = LanesOf(uint32_t{masks[block]} >> lane);
        weight = hn::IfThenElseZero(hn::RebindMask(d, lanes), weight);
      }
      hn::StoreU(weight, d, out + lane);
      sum.Add(weight);
    }
  }
  return sum.Total();
}

double SumOfTarget(const float* values, const TokenMask* masks, int64_t num_blocks) {
  const DF d;
  DoubleSum sum;
  ForEachVector(masks, num_blocks, [&](int64_t at, MI lanes) HWY_ATTR {
    sum.Add(hn::IfThenElseZero(hn::RebindMask(d, lanes), hn::LoadU(d, values + at)));
  });
  return sum.Total();
}

void KeepAtLeastTarget(const float* values, float at_least, int64_t num_blocks, TokenMask* masks) {
  const DF d;
  const DI di;
  const VF limit = hn::Set(d, at_least);
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (masks[block] == 0) continue;
    uint32_t kept = 0;
    for (int lane = 0; lane < kBlockTokens; lane += kLanes) {
      const VF x = hn::LoadU(d, values + block * kBlockTokens + lane);
      kept |= BitsOf(hn::RebindMask(di, hn::Ge(x, limit))) << lane;
    }
    masks[block] &= static_cast<TokenMask>(kept);
  }
}

// Whether a token is kept is as good as random: no branches.
double KeepWeightsTarget(const float* weights, float at_least, const TokenMask* masks,
                         int64_t num_blocks, TokenMask* kept) {
  const DF d;
  const DI di;
  const VF limit = hn::Set(d, at_least);
  DoubleSum sum;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const uint32_t mask = masks[block];
    uint32_t bits = 0;
    for (int lane = 0; lane < kBlockTokens; lane += kLanes) {
      const VF x = hn::LoadU(d, weights + block * kBlockTokens + lane);
      const MI lanes = hn::And(LanesOf(mask >> lane), hn::RebindMask(di, hn::Ge(x, limit)));
      sum.Add(hn::IfThenElseZero(hn::RebindMask(d, lanes), x));
      bits |= BitsOf(lanes) << lane;
    }
    kept[block] = static_cast<TokenMask>(bits);
  }
  return sum.Total();
}

KeyRange GatherKeysTarget(const float* values, const TokenMask* masks, int64_t num_blocks,
                          int32_t* HWY_RESTRICT keys) {
  const DI di;
  VI min = hn::Set(di, std::numeric_limits<int32_t>::max());
  VI max = hn::Set(di, std::numeric_limits<int32_t>::min());
  KeyRange range;
  ForEachVector(masks, num_blocks, [&](int64_t at, MI lanes) HWY_ATTR {
    const VI key = LoadKeys(values + at);
    min = hn::IfThenElse(lanes, hn::Min(min, key), min);
    max = hn::IfThenElse(lanes, hn::Max(max, key), max);
    range.count += StoreCompressed(key, lanes, keys + range.count);
  });
  range.min = hn::GetLane(hn::MinOfLanes(di, min));
  range.max = hn::GetLane(hn::MaxOfLanes(di, max));
  return range;
}

// Keys of values that are not negative are their bits.
int64_t GatherWeightsTarget(const float* weights, int32_t lowest, const TokenMask* masks,
                            int64_t num_blocks, int32_t* HWY_RESTRICT keys) {
  const DI di;
  const VI below = hn::Set(di, lowest - 1);
  int64_t count = 0;
  ForEachVector(masks, num_blocks, [&](int64_t at, MI lanes) HWY_ATTR {
    const VI key = hn::BitCast(di, hn::LoadU(DF(), weights + at));
    count += StoreCompressed(key, hn::And(lanes, hn::Gt(key, below)), keys + count);
  });
  return count;
}

// Eight positions are stored whatever the mask: where tokens are is as good as random.
int64_t ListTokensTarget(const TokenMask* masks, int64_t num_blocks, int32_t* HWY_RESTRICT tokens) {
  int64_t count = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int half = 0; half < kBlockTokens; half += 8) {
      const uint32_t bits = masks[block] >> half & 0xff;
      const auto first = static_cast<int32_t>(block * kBlockTokens + half);
      for (int i = 0; i < 8; ++i) tokens[count + i] = first + kSetBits.rows[bits][i];
      count += std::popcount(bits);
    }
  }
  return count;
}

int64_t CountOfTarget(const TokenMask* masks, int64_t num_blocks) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_blocks; ++i) count += std::popcount(masks[i]);
  return count;
}

using DM = hn::CappedTag<TokenMask, 16>;
constexpr int kMaskLanes = static_cast<int>(hn::MaxLanes(DM()));

void GroupBlocksTarget(const TokenMask* masks, int64_t num_blocks, TokenMask* groups) {
  const DM d;
  const int64_t whole = num_blocks / 16 * 16;
  for (int64_t block = 0; block < whole; block += 16) {
    uint32_t group = 0;
    for (int lane = 0; lane < 16; lane += kMaskLanes) {
      uint8_t bits[8] = {};
      hn::StoreMaskBits(d, hn::Ne(hn::LoadU(d, masks + block + lane), hn::Zero(d)), bits);
      group |= (bits[0] | uint32_t{bits[1]} << 8) << lane;
    }
    groups[block / 16] = static_cast<TokenMask>(group);
  }
  if (whole == num_blocks) return;
  uint32_t group = 0;
  for (int64_t block = whole; block < num_blocks; ++block) {
    group |= uint32_t{masks[block] != kNoTokens} << (block - whole);
  }
  groups[whole / 16] = static_cast<TokenMask>(group);
}

void KeepGroupedBlocksTarget(const TokenMask* groups, int64_t num_blocks, TokenMask* masks) {
  alignas(32) static constexpr TokenMask kBits[16] = {
      1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const DM d;
  const int64_t whole = num_blocks / 16 * 16;
  for (int64_t block = 0; block < whole; block += 16) {
    const auto group = hn::Set(d, groups[block / 16]);
    for (int lane = 0; lane < 16; lane += kMaskLanes) {
      TokenMask* at = masks + block + lane;
      const auto kept = hn::TestBit(group, hn::Load(d, kBits + lane));
      hn::StoreU(hn::IfThenElseZero(kept, hn::LoadU(d, at)), d, at);
    }
  }
  for (int64_t block = whole; block < num_blocks; ++block) {
    if ((groups[block / 16] >> (block - whole) & 1) == 0) masks[block] = kNoTokens;
  }
}

// The keys of [0, count) that are >= pivot and those that are not.
struct Split {
  int64_t num_above = 0;
  int64_t num_below = 0;
  int32_t min_above = 0;
  int32_t max_below = 0;
  double measure_above = 0;  // their count, or the sum of their values
};

// Moves keys >= pivot to `above`, and the others to the front of `keys`. Whole vectors are stored:
// both arrays have a vector's room behind what they hold.
template <bool kMass>
Split SplitKeys(int32_t* keys, int32_t* HWY_RESTRICT above, int64_t count, int32_t pivot) {
  const DF d;
  const DI di;
  const VI limit = hn::Set(di, pivot);
  VI min = hn::Set(di, std::numeric_limits<int32_t>::max());
  VI max = hn::Set(di, std::numeric_limits<int32_t>::min());
  DoubleSum sum;
  Split split;
  for (int64_t i = 0; i < count; i += kLanes) {
    const VI key = hn::LoadU(di, keys + i);
    const MI valid = hn::FirstN(di, static_cast<size_t>(count - i));
    const MI low = hn::And(valid, hn::Lt(key, limit));
    const MI high = hn::AndNot(low, valid);
    min = hn::IfThenElse(high, hn::Min(min, key), min);
    max = hn::IfThenElse(low, hn::Max(max, key), max);
    if constexpr (kMass) {
      // Keys of values that are not negative are their bits.
      sum.Add(hn::IfThenElseZero(hn::RebindMask(d, high), hn::BitCast(d, key)));
    }
    split.num_above += StoreCompressed(key, high, above + split.num_above);
    split.num_below += StoreCompressed(key, low, keys + split.num_below);
  }
  split.min_above = hn::GetLane(hn::MinOfLanes(di, min));
  split.max_below = hn::GetLane(hn::MaxOfLanes(di, max));
  split.measure_above = kMass ? sum.Total() : static_cast<double>(split.num_above);
  return split;
}

// Halves the undecided keys until all that are left are equal. What has been decided: keys above
// them are in, with a measure short of `wanted`, keys below them are out.
template <bool kMass>
Cut FindCut(int32_t* keys, int32_t* spare, KeyRange range, double wanted) {
  Cut cut;
  bool by_value = !kMass;
  while (range.min < range.max) {
    const int32_t pivot = PivotOf(range.min, range.max, by_value);
    const int64_t before = range.count;
    const Split split = SplitKeys<kMass>(keys, spare, range.count, pivot);
    if (cut.above + split.measure_above >= wanted) {
      std::swap(keys, spare);
      range.count = split.num_above;
      range.min = split.min_above;
    } else {
      cut.above += split.measure_above;
      range.count = split.num_below;
      range.max = split.max_below;
    }
    if (4 * range.count > 3 * before) by_value = !by_value;
  }
  cut.key = range.min;
  return cut;
}

Cut CutByCountTarget(int32_t* keys, int32_t* spare, const KeyRange& range, double count) {
  return FindCut<false>(keys, spare, range, count);
}

Cut CutByMassTarget(int32_t* keys, int32_t* spare, const KeyRange& range, double mass) {
  return FindCut<true>(keys, spare, range, mass);
}

void KeepFromCutTarget(const float* values, int32_t cut, int64_t num_equal, int64_t num_blocks,
                       TokenMask* masks) {
  const DI di;
  const VI limit = hn::Set(di, cut);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const uint32_t mask = masks[block];
    if (mask == 0) continue;
    uint32_t above = 0;
    uint32_t equal = 0;
    for (int lane = 0; lane < kBlockTokens; lane += kLanes) {
      const VI key = LoadKeys(values + block * kBlockTokens + lane);
      above |= BitsOf(hn::Gt(key, limit)) << lane;
      equal |= BitsOf(hn::Eq(key, limit)) << lane;
    }
    equal &= mask;
    uint32_t kept = above & mask;
    for (; equal != 0 && num_equal > 0; --num_equal) {
      kept |= equal & -equal;
      equal &= equal - 1;
    }
    masks[block] = static_cast<TokenMask>(kept);
  }
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(MaxOfTarget);
HWY_EXPORT(ExpWeightsTarget);
HWY_EXPORT(SumOfTarget);
HWY_EXPORT(KeepAtLeastTarget);
HWY_EXPORT(KeepWeightsTarget);
HWY_EXPORT(ListTokensTarget);
HWY_EXPORT(CountOfTarget);
HWY_EXPORT(GroupBlocksTarget);
HWY_EXPORT(KeepGroupedBlocksTarget);
HWY_EXPORT(GatherKeysTarget);
HWY_EXPORT(GatherWeightsTarget);
HWY_EXPORT(CutByCountTarget);
HWY_EXPORT(CutByMassTarget);
HWY_EXPORT(KeepFromCutTarget);

namespace {

int32_t KeyOfValue(float value) { return OrderBits(std::bit_cast<int32_t>(value + 0.0f)); }

}  // namespace

float ValueOfKey(int32_t key) { return std::bit_cast<float>(OrderBits(key)); }

KeyBuffers& ThreadKeyBuffers(int64_t num_tokens) {
  thread_local KeyBuffers buffers;
  const auto size = static_cast<size_t>(num_tokens + kBlockTokens);
  if (buffers.keys.size() < size) {
    buffers.keys.resize(size);
    buffers.spare.resize(size);
  }
  return buffers;
}

float MaxOf(const float* values, const TokenMask* masks, int64_t num_blocks) {
  return HWY_DYNAMIC_DISPATCH(MaxOfTarget)(values, masks, num_blocks);
}

double ExpWeights(const float* logits, const TokenMask* masks, int64_t num_blocks, float max,
                  float* weights) {
  return HWY_DYNAMIC_DISPATCH(ExpWeightsTarget)(logits, masks, num_blocks, max, weights);
}

double SumOf(const float* values, const TokenMask* masks, int64_t num_blocks) {
  return HWY_DYNAMIC_DISPATCH(SumOfTarget)(values, masks, num_blocks);
}

void KeepAtLeast(const float* values, float at_least, int64_t num_blocks, TokenMask* masks) {
  HWY_DYNAMIC_DISPATCH(KeepAtLeastTarget)(values, at_least, num_blocks, masks);
}

double KeepWeights(const float* weights, float at_least, const TokenMask* masks, int64_t num_blocks,
                   TokenMask* kept) {
  return HWY_DYNAMIC_DISPATCH(KeepWeightsTarget)(weights, at_least, masks, num_blocks, kept);
}

int64_t ListTokens(const TokenMask* masks, int64_t num_blocks, int32_t* tokens) {
  return HWY_DYNAMIC_DISPATCH(ListTokensTarget)(masks, num_blocks, tokens);
}

int64_t CountOf(const TokenMask* masks, int64_t num_blocks) {
  return HWY_DYNAMIC_DISPATCH(CountOfTarget)(masks, num_blocks);
}

void GroupBlocks(const TokenMask* masks, int64_t num_blocks, TokenMask* groups) {
  HWY_DYNAMIC_DISPATCH(GroupBlocksTarget)(masks, num_blocks, groups);
}

void KeepGroupedBlocks(const TokenMask* groups, int64_t num_blocks, TokenMask* masks) {
  HWY_DYNAMIC_DISPATCH(KeepGroupedBlocksTarget)(groups, num_blocks, masks);
}

KeyRange GatherKeys(const float* values, const TokenMask* masks, int64_t num_blocks,
                    KeyBuffers& buffers) {
  return HWY_DYNAMIC_DISPATCH(GatherKeysTarget)(values, masks, num_blocks, buffers.keys.data());
}

KeyRange GatherWeights(const float* weights, float at_least, const TokenMask* masks,
                       int64_t num_blocks, KeyBuffers& buffers) {
  KeyRange range;
  range.min = KeyOfValue(at_least);
  range.max = KeyOfValue(1.0f);
  range.count = HWY_DYNAMIC_DISPATCH(GatherWeightsTarget)(weights, range.min, masks, num_blocks,
                                                          buffers.keys.data());
  return range;
}

Cut CutByCount(KeyBuffers& buffers, const KeyRange& keys, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(CutByCountTarget)(buffers.keys.data(), buffers.spare.data(), keys,
                                                static_cast<double>(count));
}

Cut CutByMass(KeyBuffers& buffers, const KeyRange& keys, double mass) {
  return HWY_DYNAMIC_DISPATCH(CutByMassTarget)(buffers.keys.data(), buffers.spare.data(), keys,
                                               mass);
}

void KeepFromCut(const float* values, int32_t cut, int64_t num_equal, int64_t num_blocks,
                 TokenMask* masks) {
  HWY_DYNAMIC_DISPATCH(KeepFromCutTarget)(values, cut, num_equal, num_blocks, masks);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
