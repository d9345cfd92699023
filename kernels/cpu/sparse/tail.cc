#include "kernels/cpu/sparse/tail.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sparse/tail.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
// A register tile of sums: heads times vectors of channels.
constexpr int kTileHeads = HWY_TARGET <= HWY_AVX3 ? 4 : 3;
constexpr int kTileVectors = 4;

// Blocks ahead whose means are fetched: they are anywhere in the cache.
constexpr int64_t kPrefetchBlocks = 16;

// Weights of tokens that are not kept.
inline VF LeftWeights(const float* weights, uint32_t kept) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  alignas(64) static constexpr int32_t kBits[kBlockTokens] = {
      1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const auto is_kept = hn::TestBit(hn::Set(di, static_cast<int32_t>(kept)), hn::Load(di, kBits));
  return hn::IfThenZeroElse(hn::RebindMask(d, is_kept), hn::LoadU(d, weights));
}

// The same of a block, its lanes summed up.
inline VF LeftWeightsOfBlock(const float* weights, TokenMask kept) {
  VF sum = LeftWeights(weights, kept);
  for (int i = kLanes; i < kBlockTokens; i += kLanes) {
    sum = hn::Add(sum, LeftWeights(weights + i, uint32_t{kept} >> i));
  }
  return sum;
}

inline float LeftMass(const float* weights, TokenMask kept) {
  return hn::GetLane(hn::SumOfLanes(DF(), LeftWeightsOfBlock(weights, kept)));
}

#if HWY_TARGET != HWY_SCALAR
// Halves are added until four lanes are left, as SumOfLanes does.
template <class D>
HWY_INLINE hn::Vec<hn::CappedTag<float, 4>> SumToFour(D /*d*/, hn::Vec<D> x) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return x;
  } else {
    const hn::Half<D> half;
    return SumToFour(half, hn::Add(hn::LowerHalf(half, x), hn::UpperHalf(half, x)));
  }
}
#endif

// masses[i] = LeftMass of block i. Whether a token is kept is as good as random: no branches.
void LeftMasses(const float* weights, const TokenMask* kept, int64_t num_blocks, float* masses) {
  int64_t block = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> d4;
  const hn::Repartition<uint64_t, decltype(d4)> d64;
  const auto four_lanes = [&](int64_t i) HWY_ATTR {
    return SumToFour(DF(), LeftWeightsOfBlock(weights + i * kBlockTokens, kept[i]));
  };
  const auto halves = [&](auto a, auto b) HWY_ATTR {  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
    return hn::BitCast(d64, hn::Add(hn::InterleaveLower(d4, a, b), hn::InterleaveUpper(d4, a, b)));
  };
  for (; block + 4 <= num_blocks; block += 4) {
    const auto a = halves(four_lanes(block), four_lanes(block + 1));
    const auto b = halves(four_lanes(block + 2), four_lanes(block + 3));
    hn::StoreU(hn::Add(hn::BitCast(d4, hn::InterleaveLower(d64, a, b)),
                       hn::BitCast(d4, hn::InterleaveUpper(d64, a, b))),
               d4, masses + block);
  }
#endif
  for (; block < num_blocks; ++block) {
    masses[block] = LeftMass(weights + block * kBlockTokens, kept[block]);
  }
}

inline VF LoadMeans(const float* from) { return hn::LoadU(DF(), from); }
template <typename T>
inline VF LoadMeans(const T* from) {
  const hn::Rebind<T, DF> d;
  return hn::PromoteTo(DF(), hn::LoadU(d, from));
}

// acc[head][c] += sum over the blocks of the list, ascending, of masses[head][block] *
// mean[block][c], for kHeads heads and kNumVectors vectors of channels.
template <typename T, int kHeads, int kNumVectors>
void AddMeansTile(const TailParams& params, int64_t num_listed, int head, int channel, float* acc) {
  const DF d;
  const int64_t num_blocks = params.keys.num_blocks;
  VF sums[kHeads][kNumVectors];
  HWY_UNROLL(8)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(8)
    for (int v = 0; v < kNumVectors; ++v) {
      sums[h][v] = hn::LoadU(d, acc + (head + h) * params.head_dim + channel + v * kLanes);
    }
  }
  const auto means_of = [&](int64_t i) {
    return reinterpret_cast<const T*>(params.keys.sidecars.At(
        SidecarKind::kMeanValues, params.keys.block_table[params.listed[i]], params.keys.kv_head));
  };
  // The first pass over the blocks brings all their channels.
  const int64_t num_fetched = head == 0 && channel == 0 ? num_listed : 0;
  for (int64_t i = 0; i < num_listed; ++i) {
    if (i + kPrefetchBlocks < num_fetched) {
      PrefetchRange(means_of(i + kPrefetchBlocks), params.head_dim * int64_t{sizeof(T)});
    }
    const int64_t block = params.listed[i];
    const T* means = means_of(i) + channel;
    VF mean[kNumVectors];
    HWY_UNROLL(8)
    for (int v = 0; v < kNumVectors; ++v) mean[v] = LoadMeans(means + v * kLanes);
    HWY_UNROLL(8)
    for (int h = 0; h < kHeads; ++h) {
      const VF mass = hn::Set(d, params.masses[(head + h) * num_blocks + block]);
      HWY_UNROLL(8)
      for (int v = 0; v < kNumVectors; ++v) sums[h][v] = hn::MulAdd(mass, mean[v], sums[h][v]);
    }
  }
  HWY_UNROLL(8)
  for (int h = 0; h < kHeads; ++h) {
    HWY_UNROLL(8)
    for (int v = 0; v < kNumVectors; ++v) {
      hn::StoreU(sums[h][v], d, acc + (head + h) * params.head_dim + channel + v * kLanes);
    }
  }
}

template <typename T, int kHeads>
void AddMeansOfHeads(const TailParams& params, int64_t num_listed, int head, float* acc) {
  int channel = 0;
  for (; channel + kTileVectors * kLanes <= params.head_dim; channel += kTileVectors * kLanes) {
    AddMeansTile<T, kHeads, kTileVectors>(params, num_listed, head, channel, acc);
  }
  for (; channel < params.head_dim; channel += kLanes) {
    AddMeansTile<T, kHeads, 1>(params, num_listed, head, channel, acc);
  }
}

template <typename T>
void AddMeans(const TailParams& params, int64_t num_listed, float* acc) {
  int head = 0;
  for (; head + kTileHeads <= params.num_heads; head += kTileHeads) {
    AddMeansOfHeads<T, kTileHeads>(params, num_listed, head, acc);
  }
  switch (params.num_heads - head) {
    case 3:
      return AddMeansOfHeads<T, 3>(params, num_listed, head, acc);
    case 2:
      return AddMeansOfHeads<T, 2>(params, num_listed, head, acc);
    case 1:
      return AddMeansOfHeads<T, 1>(params, num_listed, head, acc);
    default:
      return;
  }
}

int64_t FindTailTarget(const TailParams& params, float* sums) {
  const int64_t num_blocks = params.keys.num_blocks;
  const int64_t blocks_per_mean = params.tail_block / kBlockTokens;
  for (int head = 0; head < params.num_heads; ++head) {
    float* masses = params.masses + head * num_blocks;
    LeftMasses(params.weights + head * num_blocks * kBlockTokens, params.kept + head * num_blocks,
               num_blocks, masses);
    sums[head] = 0;
    for (int64_t first = 0; first < num_blocks; first += blocks_per_mean) {
      const int64_t end = std::min(num_blocks, first + blocks_per_mean);
      float mass = masses[first];
      for (int64_t block = first + 1; block < end; ++block) mass += masses[block];
      std::fill(masses + first, masses + end, mass / static_cast<float>(end - first));
      sums[head] += mass;
    }
  }
  int64_t num_listed = 0;  // blocks to which some head gives mass
  for (int64_t block = 0; block < num_blocks; ++block) {
    bool has_mass = false;
    for (int head = 0; head < params.num_heads; ++head) {
      has_mass |= params.masses[head * num_blocks + block] > 0;
    }
    params.listed[num_listed] = static_cast<int32_t>(block);
    num_listed += has_mass;
  }
  return num_listed;
}

void AddTailMeansTarget(const TailParams& params, int64_t num_listed, float* acc) {
  switch (params.keys.kv.layout.dtype) {
    case DType::kBF16:
      return AddMeans<hwy::bfloat16_t>(params, num_listed, acc);
    case DType::kF16:
      return AddMeans<hwy::float16_t>(params, num_listed, acc);
    default:  // kF32: SparseAttention() has checked
      return AddMeans<float>(params, num_listed, acc);
  }
}

}  // namespace
}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(FindTailTarget);
HWY_EXPORT(AddTailMeansTarget);

int64_t FindTail(const TailParams& params, float* sums) {
  return HWY_DYNAMIC_DISPATCH(FindTailTarget)(params, sums);
}

void AddTailMeans(const TailParams& params, int64_t num_listed, float* acc) {
  HWY_DYNAMIC_DISPATCH(AddTailMeansTarget)(params, num_listed, acc);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
