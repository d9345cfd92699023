#include "kernels/cpu/sparse_tail.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/prefetch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sparse_tail.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kVectors = HWY_TARGET <= HWY_AVX3 ? 4 : 2;

// Blocks ahead whose means are fetched: they are anywhere in the cache.
constexpr int64_t kPrefetchBlocks = 16;

// Mass of a block's tokens that are not kept.
inline float LeftMass(const float* weights, TokenMask kept) {
  const DF d;
  const auto left = static_cast<TokenMask>(~kept);
  VF sum = hn::Zero(d);
  if (left == kAllTokens) {
    for (int i = 0; i < kBlockTokens; i += kLanes) sum = hn::Add(sum, hn::LoadU(d, weights + i));
    return hn::GetLane(hn::SumOfLanes(d, sum));
  }
  for (int i = 0; i < kBlockTokens; i += kLanes) {
    uint8_t bits[8] = {};
    const uint32_t lanes = static_cast<uint32_t>(left) >> i;
    std::memcpy(bits, &lanes, sizeof(lanes));
    sum = hn::Add(sum, hn::IfThenElseZero(hn::LoadMaskBits(d, bits), hn::LoadU(d, weights + i)));
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
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
  for (; channel + kVectors * kLanes <= params.head_dim; channel += kVectors * kLanes) {
    AddMeansTile<T, kHeads, kVectors>(params, num_listed, head, channel, acc);
  }
  for (; channel < params.head_dim; channel += kLanes) {
    AddMeansTile<T, kHeads, 1>(params, num_listed, head, channel, acc);
  }
}

template <typename T>
void AddMeans(const TailParams& params, int64_t num_listed, float* acc) {
  int head = 0;
  for (; head + 4 <= params.num_heads; head += 4) {
    AddMeansOfHeads<T, 4>(params, num_listed, head, acc);
  }
  for (; head + 2 <= params.num_heads; head += 2) {
    AddMeansOfHeads<T, 2>(params, num_listed, head, acc);
  }
  for (; head < params.num_heads; ++head) {
    AddMeansOfHeads<T, 1>(params, num_listed, head, acc);
  }
}

int64_t FindTailTarget(const TailParams& params, float* sums) {
  const int64_t num_blocks = params.keys.num_blocks;
  const int64_t blocks_per_mean = params.tail_block / kBlockTokens;
  for (int head = 0; head < params.num_heads; ++head) {
    const float* weights = params.weights + head * num_blocks * kBlockTokens;
    const TokenMask* candidates = params.candidates + head * num_blocks;
    const TokenMask* kept = params.kept + head * num_blocks;
    float* masses = params.masses + head * num_blocks;
    sums[head] = 0;
    for (int64_t first = 0; first < num_blocks; first += blocks_per_mean) {
      const int64_t end = std::min(num_blocks, first + blocks_per_mean);
      float mass = 0;
      for (int64_t block = first; block < end; ++block) {
        if ((candidates[block] & ~kept[block]) == 0) continue;
        mass += LeftMass(weights + block * kBlockTokens, kept[block]);
      }
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
