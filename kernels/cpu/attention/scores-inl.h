// Q K^T of a group, once per instruction set.
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention/rows-inl.h"
#include "kernels/cpu/attention/tile.h"

#if defined(GLOAM_ATTENTION_SCORES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ATTENTION_SCORES_INL_H
#undef GLOAM_ATTENTION_SCORES_INL_H
#else
#define GLOAM_ATTENTION_SCORES_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// Register tiles: 4 rows x 4 sums of transposed keys, or 3 rows x 8 vectors of keys as they lie;
// with 16 registers half of that or less.
constexpr int kScoreRows = kManyRegisters ? 4 : 2;
constexpr int kScoreVectors = 1;
constexpr int kBlockScoreRows = HWY_TARGET <= HWY_AVX2 || kManyRegisters ? 3 : 1;
// q . k is the sum of kLanes partial sums: number l takes the channels c with c % kLanes = l, in
// ascending order. They are added as a tree: (x0 + x2) + (x1 + x3) of every four, and the kLanes /
// 4 results in neighbouring pairs.

#if HWY_TARGET == HWY_SCALAR

template <int kRows, typename Rows>
void ScoreBlockRows(const float* HWY_RESTRICT queries, const Rows& rows, bool /*prefetch*/,
                    int head_dim, float* HWY_RESTRICT scores) {
  for (int r = 0; r < kRows; ++r) {
    for (int token = 0; token < kBlockTokens; ++token) {
      const auto* key = rows[token];
      float sum = queries[r * head_dim] * ToFloat(key[0]);
      for (int c = 1; c < head_dim; ++c) {
        sum = hn::GetLane(hn::MulAdd(hn::Set(DF(), queries[r * head_dim + c]),
                                     hn::Set(DF(), ToFloat(key[c])), hn::Set(DF(), sum)));
      }
      scores[r * kGroupTokens + token] = sum;
    }
  }
}

template <int kRows>
void ScoreRows(const float* HWY_RESTRICT queries, const float* HWY_RESTRICT keys, int head_dim,
               float* HWY_RESTRICT scores) {
  for (int r = 0; r < kRows; ++r) {
    for (int token = 0; token < kGroupTokens; ++token) {
      float sum = queries[r * head_dim] * keys[token];
      for (int c = 1; c < head_dim; ++c) {
        sum = hn::GetLane(hn::MulAdd(hn::Set(DF(), queries[r * head_dim + c]),
                                     hn::Set(DF(), keys[c * kGroupTokens + token]),
                                     hn::Set(DF(), sum)));
      }
      scores[r * kGroupTokens + token] = sum;
    }
  }
}

#else

// Lane i of each 128-bit block of the result: the tree over that block's lanes of xi.
inline VF AddTreeOfBlocks(VF x0, VF x1, VF x2, VF x3) {
  const DF d;
  const hn::Repartition<uint64_t, DF> d64;
  const auto halves = [&](VF a, VF b) HWY_ATTR {  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
    return hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto a = halves(x0, x1);
  const auto b = halves(x2, x3);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, a, b)),
                 hn::BitCast(d, hn::InterleaveUpper(d64, a, b)));
}

// Blocks of the result: a[0] + a[1], b[0] + b[1], a[2] + a[3], b[2] + b[3].
inline VF AddBlockPairs(VF a, VF b) {
  return hn::Add(hn::OddEvenBlocks(b, a), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(a, b)));
}

// scores[row][token] = q[row] . k[token] for kRows queries and the tokens of one block: lanes are
// channels.
template <int kRows, typename Rows>
void ScoreBlockRows(const float* HWY_RESTRICT queries, const Rows& rows, bool prefetch,
                    int head_dim, float* HWY_RESTRICT scores) {
  const DF d;
  VF quads[kRows][4];  // of four tokens each
  HWY_UNROLL(4)
  for (int quad = 0; quad < 4; ++quad) {
    if (prefetch) rows.PrefetchNext(4 * quad, 4);
    decltype(rows[0]) keys[4];
    HWY_UNROLL(4)
    for (int t = 0; t < 4; ++t) keys[t] = rows[4 * quad + t];
    VF sums[kRows][4];
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(4)
      for (int t = 0; t < 4; ++t) sums[r][t] = hn::Zero(d);
    }
    ForChannels(head_dim, [&](int channel, const auto& load) HWY_ATTR {
      VF q[kRows];
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) q[r] = hn::Load(d, queries + r * head_dim + channel);
      HWY_UNROLL(4)
      for (int t = 0; t < 4; ++t) {
        const VF key = load(keys[t]);
        HWY_UNROLL(8)
        for (int r = 0; r < kRows; ++r) sums[r][t] = hn::MulAdd(q[r], key, sums[r][t]);
      }
    });
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      quads[r][quad] = AddTreeOfBlocks(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    float* to = scores + r * kGroupTokens;
    if constexpr (kLanes == 4) {
      for (int quad = 0; quad < 4; ++quad) hn::Store(quads[r][quad], d, to + 4 * quad);
    } else {
      const VF first = AddBlockPairs(quads[r][0], quads[r][1]);
      const VF second = AddBlockPairs(quads[r][2], quads[r][3]);
      if constexpr (kLanes == 8) {
        hn::Store(first, d, to);
        hn::Store(second, d, to + kLanes);
      } else {
        hn::Store(
            hn::Add(hn::ConcatLowerLower(d, second, first), hn::ConcatUpperUpper(d, second, first)),
            d, to);
      }
    }
  }
}

// The same for kRows rows and kVectors vectors of tokens, from transposed keys: lanes are tokens.
template <int kRows, int kVectors>
struct ScoreTile {
  const float* HWY_RESTRICT queries;
  const float* HWY_RESTRICT keys;
  int head_dim;
  using Sums = VF[kRows][kVectors];

  // Partial sum l.
  HWY_INLINE void Partial(int l, Sums& sums) const {
    const DF d;
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      const VF key = hn::Load(d, keys + l * kGroupTokens + v * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = hn::Mul(hn::Set(d, queries[r * head_dim + l]), key);
      }
    }
    for (int c = l + kLanes; c < head_dim; c += kLanes) {
      VF key[kVectors];
      HWY_UNROLL(8)
      for (int v = 0; v < kVectors; ++v) {
        key[v] = hn::Load(d, keys + c * kGroupTokens + v * kLanes);
      }
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const VF q = hn::Set(d, queries[r * head_dim + c]);
        HWY_UNROLL(8)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(q, key[v], sums[r][v]);
      }
    }
  }

  HWY_INLINE void Add(const Sums& other, Sums& sums) const {
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(8)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::Add(sums[r][v], other[r][v]);
    }
  }

  // The tree over partial sums 4 i to 4 i + 3.
  HWY_INLINE void OfBlock(int i, Sums& sums) const {
    Sums odd, other;
    Partial(4 * i, sums);
    Partial(4 * i + 2, other);
    Add(other, sums);
    Partial(4 * i + 1, odd);
    Partial(4 * i + 3, other);
    Add(other, odd);
    Add(odd, sums);
  }

  // The tree over partial sums 8 i to 8 i + 7.
  HWY_INLINE void OfBlockPair(int i, Sums& sums) const {
    Sums other;
    OfBlock(2 * i, sums);
    OfBlock(2 * i + 1, other);
    Add(other, sums);
  }

  HWY_INLINE void Total(Sums& sums) const {
    if constexpr (kLanes == 4) {
      OfBlock(0, sums);
    } else {
      OfBlockPair(0, sums);
      if constexpr (kLanes == 16) {
        Sums other;
        OfBlockPair(1, other);
        Add(other, sums);
      }
    }
  }
};

template <int kRows>
void ScoreRows(const float* HWY_RESTRICT queries, const float* HWY_RESTRICT keys, int head_dim,
               float* HWY_RESTRICT scores) {
  const DF d;
  for (int token = 0; token < kGroupTokens; token += kScoreVectors * kLanes) {
    const ScoreTile<kRows, kScoreVectors> tile = {queries, keys + token, head_dim};
    typename ScoreTile<kRows, kScoreVectors>::Sums sums;
    tile.Total(sums);
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(8)
      for (int v = 0; v < kScoreVectors; ++v) {
        hn::Store(sums[r][v], d, scores + r * kGroupTokens + token + v * kLanes);
      }
    }
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

// Scores of all rows with the tokens of one block, without transposition.
template <typename Rows>
void ScoreFewRows(const float* queries, const Rows& keys, int num_rows, int head_dim,
                  float* scores) {
  // The first rows ask for what comes next.
  const auto score = [&](auto num, int row) HWY_ATTR {
    ScoreBlockRows<decltype(num)::value>(queries + row * head_dim, keys, row == 0, head_dim,
                                         scores + row * kGroupTokens);
  };
  constexpr std::integral_constant<int, kBlockScoreRows> kMost;
  int row = 0;
  for (; row + kBlockScoreRows <= num_rows; row += kBlockScoreRows) score(kMost, row);
  if constexpr (kBlockScoreRows > 1) {
    if (num_rows - row == 2) return score(std::integral_constant<int, 2>(), row);
    if (num_rows - row == 1) return score(std::integral_constant<int, 1>(), row);
  }
}

void ScoreAllRows(const float* queries, const float* keys, int num_rows, int head_dim,
                  float* scores) {
  int row = 0;
  for (; row + kScoreRows <= num_rows; row += kScoreRows) {
    ScoreRows<kScoreRows>(queries + row * head_dim, keys, head_dim, scores + row * kGroupTokens);
  }
  queries += row * head_dim;
  scores += row * kGroupTokens;
  switch (num_rows - row) {
    case 3:
      return ScoreRows<3>(queries, keys, head_dim, scores);
    case 2:
      return ScoreRows<2>(queries, keys, head_dim, scores);
    case 1:
      return ScoreRows<1>(queries, keys, head_dim, scores);
    default:
      return;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
