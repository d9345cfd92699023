#include "kernels/cpu/attention/tile.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <type_traits>

#include "kernels/cpu/attention/piece_prefetcher.h"
#include "kernels/cpu/bf16.h"
#include "kernels/float16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention/tile.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Register tiles. 32 vector registers hold 4 rows x 4 sums of Q K^T, or 3 rows x 8 vectors of it
// without transposition, and 4 rows x 4 vectors of P V; with 16 registers half of that or less.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kScoreRows = kManyRegisters ? 4 : 2;
constexpr int kScoreVectors = 1;
constexpr int kBlockScoreRows = HWY_TARGET <= HWY_AVX2 || kManyRegisters ? 3 : 1;
constexpr int kValueRows = 4;
constexpr int kValueVectors = kManyRegisters ? 4 : 2;

// Rows up to which transposing a group's keys costs more than it saves.
constexpr int kUntransposedRows = 8;
// Rows from which it pays to convert a group's values to fp32 once instead of once per 4 rows.
constexpr int kConvertValuesRows = 2 * kValueRows;

inline float ToFloat(float value) { return value; }
inline float ToFloat(hwy::bfloat16_t value) { return FloatFromBf16(value.bits); }
inline float ToFloat(hwy::float16_t value) { return F16ToF32(value.bits); }

inline VF ExpOf(VF x) { return hn::Exp(DF(), x); }

// Writes keys of one block, [16][row_words] as 32-bit words, as fp32 columns of `out`,
// [head_dim][kGroupTokens]. A word is one fp32 or a pair of 16-bit floats, the lower channel in
// the low half.
#if HWY_TARGET == HWY_SCALAR

template <typename T>
void TransposeKeys(const T* block, int head_dim, float* HWY_RESTRICT out) {
  for (int token = 0; token < kBlockTokens; ++token) {
    for (int channel = 0; channel < head_dim; ++channel) {
      out[channel * kGroupTokens + token] = ToFloat(block[token * head_dim + channel]);
    }
  }
}

#else

// Loads the 16-byte pieces at from, from + 4 * stride, ... into the vector's 128-bit blocks.
inline hn::Vec<hn::Repartition<uint32_t, DF> > LoadPieces(const uint32_t* from, int64_t stride) {
  const hn::Repartition<uint32_t, DF> d;
  if constexpr (kLanes == 4) {
    return hn::LoadU(d, from);
  } else {
    const hn::Half<decltype(d)> dh;
    if constexpr (kLanes == 8) {
      return hn::Combine(d, hn::LoadU(dh, from + 4 * stride), hn::LoadU(dh, from));
    } else {
      const hn::Half<decltype(dh)> dq;
      const auto low = hn::Combine(dh, hn::LoadU(dq, from + 4 * stride), hn::LoadU(dq, from));
      const auto high =
          hn::Combine(dh, hn::LoadU(dq, from + 12 * stride), hn::LoadU(dq, from + 8 * stride));
      return hn::Combine(d, high, low);
    }
  }
}

// The fp16 in the low half of each word.
inline VF PromoteF16(hn::Vec<hn::Repartition<uint32_t, DF> > words) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  return hn::PromoteTo(DF(), hn::BitCast(df16, hn::TruncateTo(d16, words)));
}

template <typename T>
void TransposeKeys(const T* block, int head_dim, float* HWY_RESTRICT out) {
  const DF df;
  const hn::Repartition<uint32_t, DF> d32;
  const hn::Repartition<uint64_t, DF> d64;
  constexpr int kPerWord = 4 / sizeof(T);
  const int64_t row_words = head_dim / kPerWord;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block);
  const auto store = [&](auto word, int channel, int token) HWY_ATTR {
    const auto bits = hn::BitCast(d32, word);
    float* to = out + channel * kGroupTokens + token;
    if constexpr (kPerWord == 1) {
      hn::Store(hn::BitCast(df, bits), df, to);
    } else if constexpr (std::is_same_v<T, hwy::float16_t>) {
      hn::Store(PromoteF16(bits), df, to);
      hn::Store(PromoteF16(hn::ShiftRight<16>(bits)), df, to + kGroupTokens);
    } else {
      hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(bits)), df, to);
      hn::Store(hn::BitCast(df, hn::And(bits, hn::Set(d32, 0xffff0000u))), df, to + kGroupTokens);
    }
  };
  // Each step transposes 4 words of kLanes tokens: block b of vector i has token 4 b + i.
  for (int token = 0; token < kBlockTokens; token += kLanes) {
    const uint32_t* row = words + token * row_words;
    for (int word = 0; word < row_words; word += 4) {
      const auto v0 = LoadPieces(row + word, row_words);
      const auto v1 = LoadPieces(row + word + row_words, row_words);
      const auto v2 = LoadPieces(row + word + 2 * row_words, row_words);
      const auto v3 = LoadPieces(row + word + 3 * row_words, row_words);
      const auto a = hn::BitCast(d64, hn::InterleaveLower(d32, v0, v1));
      const auto b = hn::BitCast(d64, hn::InterleaveLower(d32, v2, v3));
      const auto c = hn::BitCast(d64, hn::InterleaveUpper(d32, v0, v1));
      const auto d = hn::BitCast(d64, hn::InterleaveUpper(d32, v2, v3));
      store(hn::InterleaveLower(d64, a, b), (word + 0) * kPerWord, token);
      store(hn::InterleaveUpper(d64, a, b), (word + 1) * kPerWord, token);
      store(hn::InterleaveLower(d64, c, d), (word + 2) * kPerWord, token);
      store(hn::InterleaveUpper(d64, c, d), (word + 3) * kPerWord, token);
    }
  }
}

#endif  // HWY_TARGET == HWY_SCALAR

// kLanes neighbouring channels of a key or a value.
inline VF LoadChannels(const float* from) { return hn::Load(DF(), from); }
template <typename T>
inline VF LoadChannels(const T* from) {
  const hn::Rebind<T, DF> d;
  return hn::PromoteTo(DF(), hn::Load(d, from));
}

// Keys or values of one block, by token: one after another, or each at an address of its own.
template <typename T>
struct BlockRows {
  const T* data;
  int64_t head_dim;
  HWY_INLINE const T* operator[](int token) const { return data + token * head_dim; }
};
template <typename T>
struct ListedRows {
  const std::byte* const* rows;
  int64_t offset_bytes;
  HWY_INLINE const T* operator[](int token) const {
    return reinterpret_cast<const T*>(rows[token] + offset_bytes);
  }
};

// q . k is the sum of kLanes partial sums: number l takes the channels c with c % kLanes = l, in
// ascending order. They are added as a tree: (x0 + x2) + (x1 + x3) of every four, and the kLanes /
// 4 results in neighbouring pairs.

#if HWY_TARGET == HWY_SCALAR

template <int kRows, typename Rows>
void ScoreBlockRows(const float* HWY_RESTRICT queries, const Rows& rows, int head_dim,
                    const PrefetchStep& prefetch, float* HWY_RESTRICT scores) {
  prefetch();
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
void ScoreBlockRows(const float* HWY_RESTRICT queries, const Rows& rows, int head_dim,
                    const PrefetchStep& prefetch, float* HWY_RESTRICT scores) {
  const DF d;
  VF quads[kRows][4];  // of four tokens each
  HWY_UNROLL(4)
  for (int quad = 0; quad < 4; ++quad) {
    prefetch();
    decltype(rows[0]) keys[4];
    VF sums[kRows][4];
    HWY_UNROLL(4)
    for (int t = 0; t < 4; ++t) {
      keys[t] = rows[4 * quad + t];
      const VF key = LoadChannels(keys[t]);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        sums[r][t] = hn::Mul(hn::Load(d, queries + r * head_dim), key);
      }
    }
    for (int c = kLanes; c < head_dim; c += kLanes) {
      VF q[kRows];
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) q[r] = hn::Load(d, queries + r * head_dim + c);
      HWY_UNROLL(4)
      for (int t = 0; t < 4; ++t) {
        const VF key = LoadChannels(keys[t] + c);
        HWY_UNROLL(8)
        for (int r = 0; r < kRows; ++r) sums[r][t] = hn::MulAdd(q[r], key, sums[r][t]);
      }
    }
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

// Scores of all rows with the tokens of a group's blocks, without transposition.
template <typename Rows>
void ScoreFewRows(const float* queries, const Rows& keys, int num_rows, int head_dim,
                  const PrefetchStep& prefetch, float* scores) {
  int row = 0;
  for (; row + kBlockScoreRows <= num_rows; row += kBlockScoreRows) {
    ScoreBlockRows<kBlockScoreRows>(queries + row * head_dim, keys, head_dim, prefetch,
                                    scores + row * kGroupTokens);
  }
  queries += row * head_dim;
  scores += row * kGroupTokens;
  if (num_rows - row == 2) ScoreBlockRows<2>(queries, keys, head_dim, prefetch, scores);
  if (num_rows - row == 1) ScoreBlockRows<1>(queries, keys, head_dim, prefetch, scores);
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

// One step of a row's online softmax: scores become probabilities relative to the running maximum.
// Tokens outside [first, last] of the group are masked.
inline void SoftmaxStep(float* HWY_RESTRICT scores, int first, int last, int head_dim, float* max,
                        float* HWY_RESTRICT lane_sums, float* HWY_RESTRICT acc) {
  const DF d;
  constexpr int kVectors = kGroupTokens / kLanes;
  if (first > 0 || last < kGroupTokens - 1) {
    const VF masked = hn::Set(d, -std::numeric_limits<float>::infinity());
    const VF lower = hn::Set(d, static_cast<float>(first));
    const VF upper = hn::Set(d, static_cast<float>(last));
    for (int v = 0; v < kVectors; ++v) {
      const VF token = hn::Iota(d, static_cast<float>(v * kLanes));
      const auto seen = hn::And(hn::Ge(token, lower), hn::Le(token, upper));
      hn::Store(hn::IfThenElse(seen, hn::Load(d, scores + v * kLanes), masked), d,
                scores + v * kLanes);
    }
  }
  VF largest = hn::Load(d, scores);
  HWY_UNROLL(8)
  for (int v = 1; v < kVectors; ++v) largest = hn::Max(largest, hn::Load(d, scores + v * kLanes));
  const float group_max = hn::GetLane(hn::MaxOfLanes(d, largest));
  VF sum = hn::Load(d, lane_sums);
  if (group_max > *max) {
    const VF shrink = ExpOf(hn::Set(d, *max - group_max));
    *max = group_max;
    sum = hn::Mul(sum, shrink);
    for (int c = 0; c < head_dim; c += kLanes) {
      hn::Store(hn::Mul(hn::Load(d, acc + c), shrink), d, acc + c);
    }
  }
  const VF reference = hn::Set(d, *max);
  HWY_UNROLL(8)
  for (int v = 0; v < kVectors; ++v) {
    const VF prob = ExpOf(hn::Sub(hn::Load(d, scores + v * kLanes), reference));
    sum = hn::Add(sum, prob);
    hn::Store(prob, d, scores + v * kLanes);
  }
  hn::Store(sum, d, lane_sums);
}

// Scores of tokens without a bit in `seen` become minus infinity.
inline void MaskScores(uint32_t seen, float* scores) {
  if (seen == std::numeric_limits<uint32_t>::max()) return;
  for (int token = 0; token < kGroupTokens; ++token) {
    if ((seen >> token & 1) == 0) scores[token] = -std::numeric_limits<float>::infinity();
  }
}

// acc[row][c] += sum over tokens, ascending, of probs[row][token] * values[token][c], for kRows
// rows and kVectors vectors of channels from `channel` on.
template <int kRows, int kVectors, typename Rows>
inline void AddValuesTile(const float* HWY_RESTRICT probs, const Rows& values, int channel,
                          int num_tokens, int head_dim, const PrefetchStep& prefetch,
                          float* HWY_RESTRICT acc) {
  const DF d;
  VF sums[kRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = hn::Load(d, acc + r * head_dim + v * kLanes);
    }
  }
  for (int token = 0; token < num_tokens; ++token) {
    if (token % 4 == 0) prefetch();
    VF value[kVectors];
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      value[v] = LoadChannels(values[token] + channel + v * kLanes);
    }
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const VF prob = hn::Set(d, probs[r * kGroupTokens + token]);
      HWY_UNROLL(8)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(prob, value[v], sums[r][v]);
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      hn::Store(sums[r][v], d, acc + r * head_dim + v * kLanes);
    }
  }
}

template <int kRows, typename Rows>
void AddValuesRows(const float* probs, const Rows& values, int num_tokens, int head_dim,
                   const PrefetchStep& prefetch, float* acc) {
  int c = 0;
  for (; c + kValueVectors * kLanes <= head_dim; c += kValueVectors * kLanes) {
    AddValuesTile<kRows, kValueVectors>(probs, values, c, num_tokens, head_dim, prefetch, acc + c);
  }
  for (; c < head_dim; c += kLanes) {
    AddValuesTile<kRows, 1>(probs, values, c, num_tokens, head_dim, prefetch, acc + c);
  }
}

template <typename Rows>
void AddValues(const float* probs, const Rows& values, int num_tokens, int num_rows, int head_dim,
               const PrefetchStep& prefetch, float* acc) {
  int row = 0;
  for (; row + kValueRows <= num_rows; row += kValueRows) {
    AddValuesRows<kValueRows>(probs + row * kGroupTokens, values, num_tokens, head_dim, prefetch,
                              acc + row * head_dim);
  }
  probs += row * kGroupTokens;
  acc += row * head_dim;
  switch (num_rows - row) {
    case 3:
      return AddValuesRows<3>(probs, values, num_tokens, head_dim, prefetch, acc);
    case 2:
      return AddValuesRows<2>(probs, values, num_tokens, head_dim, prefetch, acc);
    case 1:
      return AddValuesRows<1>(probs, values, num_tokens, head_dim, prefetch, acc);
    default:
      return;
  }
}

// The part of AttendPartition that the rows of KV head `head` of the tile have in one group.
// `rows_of_head` are that head's.
template <typename T, bool kListed>
void AttendGroup(const AttentionTile& tile, int head, int64_t group, int64_t end,
                 const TileWorkspace& workspace, const PrefetchStep& prefetch,
                 const AttentionPartial& rows_of_head) {
  const DF d;
  const int head_dim = tile.kv.layout.head_dim;
  const int kv_head = tile.kv_head + head;
  const int heads = tile.heads_per_kv;
  const int num_tokens = static_cast<int>(std::min<int64_t>(kGroupTokens, end - group));
  const int num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int32_t* blocks = tile.block_table + group / kBlockTokens;
  const int first_row_of_head = head * tile.rows_per_kv_head();
  const float* queries = workspace.queries + int64_t{first_row_of_head} * head_dim;
  float* lane_sums = workspace.lane_sums + first_row_of_head * kBlockTokens;

  // Tokens of the tile that see some position of the group.
  const int64_t first_token = std::max<int64_t>(0, group - tile.first_position);
  const int64_t last_token = std::min<int64_t>(
      tile.num_tokens - 1, group + kGroupTokens - 2 + tile.window - tile.first_position);
  if (first_token > last_token) return;
  const int first_row = static_cast<int>(first_token) * heads;
  const int rows = static_cast<int>(last_token - first_token + 1) * heads;
  float* scores = workspace.probs + first_row * kGroupTokens;
  float* acc = rows_of_head.acc + first_row * head_dim;

  const auto rows_of_block = [&](bool values, int i) HWY_ATTR {
    if constexpr (kListed) {
      return ListedRows<T>{tile.rows + group + i * kBlockTokens, values ? tile.values_offset : 0};
    } else {
      return BlockRows<T>{values ? tile.kv.Values<const T>(blocks[i], kv_head)
                                 : tile.kv.Keys<const T>(blocks[i], kv_head),
                          head_dim};
    }
  };
  const bool transpose = !kListed && rows > kUntransposedRows;
  for (int i = 0; i < num_blocks; ++i) {
    const auto keys = rows_of_block(/*values=*/false, i);
    if (transpose) {
      TransposeKeys(keys[0], head_dim, workspace.keys + i * kBlockTokens);
    } else {
      ScoreFewRows(queries + first_row * head_dim, keys, rows, head_dim, prefetch,
                   scores + i * kBlockTokens);
    }
  }
  if (transpose) {
    ScoreAllRows(queries + first_row * head_dim, workspace.keys, rows, head_dim, scores);
  }

  if (tile.logits != nullptr) {
    for (int row = 0; row < rows; ++row) {
      std::copy_n(tile.logits + row * tile.logits_stride + group, kGroupTokens,
                  scores + row * kGroupTokens);
    }
  }
  if (tile.row_masks != nullptr) {
    for (int row = 0; row < rows; ++row) {
      MaskScores(tile.row_masks[row * tile.row_mask_stride + group / kGroupTokens],
                 scores + row * kGroupTokens);
    }
  }
  for (int row = first_row; row < first_row + rows; ++row) {
    const int64_t position = tile.first_position + row / heads;
    const int64_t first = std::max<int64_t>(0, position - tile.window + 1 - group);
    const int64_t last = std::min<int64_t>(kGroupTokens - 1, position - group);
    SoftmaxStep(workspace.probs + row * kGroupTokens, static_cast<int>(first),
                static_cast<int>(last), head_dim, &rows_of_head.max[row],
                lane_sums + row * kBlockTokens, rows_of_head.acc + row * head_dim);
  }

  // Values past the last position that a row sees are not read: they may be anything.
  const bool convert = sizeof(T) == 2 && rows >= kConvertValuesRows;
  for (int i = 0; i < num_blocks; ++i) {
    const auto values = rows_of_block(/*values=*/true, i);
    const int tokens = std::min(kBlockTokens, num_tokens - i * kBlockTokens);
    if (convert) {
      float* to = workspace.values + i * kBlockTokens * head_dim;
      for (int token = 0; token < tokens; ++token, to += head_dim) {
        for (int c = 0; c < head_dim; c += kLanes) {
          hn::Store(LoadChannels(values[token] + c), d, to + c);
        }
      }
    } else {
      AddValues(scores + i * kBlockTokens, values, tokens, rows, head_dim, prefetch, acc);
    }
  }
  if (convert) {
    AddValues(scores, BlockRows<float>{workspace.values, head_dim}, num_tokens, rows, head_dim,
              prefetch, acc);
  }
}

template <typename T, bool kListed>
void AttendPartitionOf(const AttentionTile& tile, int64_t partition, const TileWorkspace& workspace,
                       const AttentionPartial& result) {
  const DF d;
  const int head_dim = tile.kv.layout.head_dim;
  const int num_rows = tile.num_rows();
  ClearPartial(result, num_rows, head_dim);
  std::fill_n(workspace.lane_sums, num_rows * kBlockTokens, 0.0f);

  const int64_t begin = std::max(partition * kPartitionTokens, tile.begin());
  const int64_t end = std::min((partition + 1) * kPartitionTokens, tile.end());
  for (int64_t group = begin / kGroupTokens * kGroupTokens; group < end; group += kGroupTokens) {
    // The next group, of the next partition too, comes while this one is computed.
    const int64_t next = group + kGroupTokens;
    const int64_t next_tokens = std::clamp<int64_t>(tile.end() - next, 0, kGroupTokens);
    PiecePrefetcher next_pieces =
        kListed
            ? PiecePrefetcher::OfRows(tile.kv, tile.rows + next, next_tokens, tile.values_offset)
            : PiecePrefetcher::OfBlocks(tile.kv, tile.kv_head, tile.num_kv_heads,
                                        tile.block_table + next / kBlockTokens,
                                        (next_tokens + kBlockTokens - 1) / kBlockTokens);
    const int64_t num_steps = int64_t{tile.num_kv_heads} * kPrefetchSteps;
    const PrefetchStep prefetch = {&next_pieces,
                                   (next_pieces.NumLines() + num_steps - 1) / num_steps};
    for (int head = 0; head < tile.num_kv_heads; ++head) {
      const int64_t first_row = int64_t{head} * tile.rows_per_kv_head();
      AttendGroup<T, kListed>(tile, head, group, end, workspace, prefetch,
                              {result.acc + first_row * head_dim, nullptr, result.max + first_row});
    }
  }
  for (int row = 0; row < num_rows; ++row) {
    result.sum[row] =
        hn::GetLane(hn::SumOfLanes(d, hn::Load(d, workspace.lane_sums + row * kBlockTokens)));
  }
}

template <bool kListed>
void AttendPartitionFrom(const AttentionTile& tile, int64_t partition,
                         const TileWorkspace& workspace, const AttentionPartial& result) {
  switch (tile.kv.layout.dtype) {
    case DType::kBF16:
      return AttendPartitionOf<hwy::bfloat16_t, kListed>(tile, partition, workspace, result);
    case DType::kF16:
      return AttendPartitionOf<hwy::float16_t, kListed>(tile, partition, workspace, result);
    default:  // kF32: the callers have checked
      return AttendPartitionOf<float, kListed>(tile, partition, workspace, result);
  }
}

void AttendPartitionTarget(const AttentionTile& tile, int64_t partition,
                           const TileWorkspace& workspace, const AttentionPartial& result) {
  if (tile.rows != nullptr) return AttendPartitionFrom<true>(tile, partition, workspace, result);
  AttendPartitionFrom<false>(tile, partition, workspace, result);
}

void FoldPartialTarget(const AttentionPartial& total, const AttentionPartial& part, int num_rows,
                       int head_dim) {
  const DF d;
  for (int row = 0; row < num_rows; ++row) {
    const float max = std::max(total.max[row], part.max[row]);
    const VF keep = ExpOf(hn::Set(d, total.max[row] - max));
    const VF take = ExpOf(hn::Set(d, part.max[row] - max));
    float* acc = total.acc + row * head_dim;
    const float* add = part.acc + row * head_dim;
    for (int c = 0; c < head_dim; c += kLanes) {
      const VF kept = hn::Mul(hn::Load(d, acc + c), keep);
      hn::Store(hn::MulAdd(hn::Load(d, add + c), take, kept), d, acc + c);
    }
    total.sum[row] = total.sum[row] * hn::GetLane(keep) + part.sum[row] * hn::GetLane(take);
    total.max[row] = max;
  }
}

void ScaleRowTarget(const float* in, float scale, int count, float* out) {
  const DF d;
  const VF factor = hn::Set(d, scale);
  for (int i = 0; i < count; i += kLanes) {
    hn::StoreU(hn::Mul(hn::LoadU(d, in + i), factor), d, out + i);
  }
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(AttendPartitionTarget);
HWY_EXPORT(FoldPartialTarget);
HWY_EXPORT(ScaleRowTarget);

void AttendPartition(const AttentionTile& tile, int64_t partition, const TileWorkspace& workspace,
                     const AttentionPartial& result) {
  HWY_DYNAMIC_DISPATCH(AttendPartitionTarget)(tile, partition, workspace, result);
}

void PrefetchBlocks(const KvLayerView& kv, int kv_head, int num_kv_heads, const int32_t* blocks,
                    int64_t num_blocks) {
  PiecePrefetcher prefetcher =
      PiecePrefetcher::OfBlocks(kv, kv_head, num_kv_heads, blocks, num_blocks);
  prefetcher.Advance(prefetcher.NumLines());
}

void ClearPartial(const AttentionPartial& total, int num_rows, int head_dim) {
  std::fill_n(total.acc, int64_t{num_rows} * head_dim, 0.0f);
  std::fill_n(total.sum, num_rows, 0.0f);
  // Below every score, and finite: differences of maxima must be numbers.
  std::fill_n(total.max, num_rows, -FLT_MAX);
}

void FoldPartial(const AttentionPartial& total, const AttentionPartial& part, int num_rows,
                 int head_dim) {
  HWY_DYNAMIC_DISPATCH(FoldPartialTarget)(total, part, num_rows, head_dim);
}

void ScaleRow(const float* in, float scale, int count, float* out) {
  HWY_DYNAMIC_DISPATCH(ScaleRowTarget)(in, scale, count, out);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
