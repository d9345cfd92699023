#include "kernels/cpu/attention_tile.h"

#include <algorithm>
#include <cfloat>
#include <limits>
#include <type_traits>

#include "kernels/cpu/bf16.h"
#include "kernels/float16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_tile.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// Register tiles. 32 vector registers hold 4 rows x 2 vectors x 2 sums of Q K^T and 4 rows x 4
// vectors of P V; with 16 registers half of that.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kScoreRows = kManyRegisters ? 4 : 2;
constexpr int kScoreVectors = 2;
constexpr int kValueRows = 4;
constexpr int kValueVectors = kManyRegisters ? 4 : 2;

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

// scores[row][token] = q[row] . k[token] for kRows rows and a group's tokens: channels in ascending
// order, even and odd ones in separate sums.
template <int kRows>
void ScoreRows(const float* HWY_RESTRICT queries, const float* HWY_RESTRICT keys, int head_dim,
               float* HWY_RESTRICT scores) {
  const DF d;
  constexpr int kStep = kScoreVectors * kLanes;
  for (int token = 0; token < kGroupTokens; token += kStep) {
    VF even[kRows][kScoreVectors];
    VF odd[kRows][kScoreVectors];
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(8)
      for (int v = 0; v < kScoreVectors; ++v) even[r][v] = odd[r][v] = hn::Zero(d);
    }
    for (int channel = 0; channel < head_dim; channel += 2) {
      const float* k0 = keys + channel * kGroupTokens + token;
      VF key[kScoreVectors];
      HWY_UNROLL(8)
      for (int v = 0; v < kScoreVectors; ++v) key[v] = hn::Load(d, k0 + v * kLanes);
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const VF q = hn::Set(d, queries[r * head_dim + channel]);
        HWY_UNROLL(8)
        for (int v = 0; v < kScoreVectors; ++v) even[r][v] = hn::MulAdd(q, key[v], even[r][v]);
      }
      HWY_UNROLL(8)
      for (int v = 0; v < kScoreVectors; ++v) {
        key[v] = hn::Load(d, k0 + kGroupTokens + v * kLanes);
      }
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const VF q = hn::Set(d, queries[r * head_dim + channel + 1]);
        HWY_UNROLL(8)
        for (int v = 0; v < kScoreVectors; ++v) odd[r][v] = hn::MulAdd(q, key[v], odd[r][v]);
      }
    }
    HWY_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(8)
      for (int v = 0; v < kScoreVectors; ++v) {
        hn::Store(hn::Add(even[r][v], odd[r][v]), d,
                  scores + r * kGroupTokens + token + v * kLanes);
      }
    }
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

inline VF LoadValues(const float* from) { return hn::Load(DF(), from); }
template <typename T>
inline VF LoadValues(const T* from) {
  const hn::Rebind<T, DF> d;
  return hn::PromoteTo(DF(), hn::Load(d, from));
}

// acc[row][c] += sum over tokens, ascending, of probs[row][token] * values[token][c], for kRows
// rows and kVectors vectors of channels.
template <int kRows, int kVectors, typename T>
inline void AddValuesTile(const float* HWY_RESTRICT probs, const T* HWY_RESTRICT values,
                          int num_tokens, int head_dim, float* HWY_RESTRICT acc) {
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
    VF value[kVectors];
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      value[v] = LoadValues(values + token * head_dim + v * kLanes);
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

template <int kRows, typename T>
void AddValuesRows(const float* probs, const T* values, int num_tokens, int head_dim, float* acc) {
  int c = 0;
  for (; c + kValueVectors * kLanes <= head_dim; c += kValueVectors * kLanes) {
    AddValuesTile<kRows, kValueVectors>(probs, values + c, num_tokens, head_dim, acc + c);
  }
  for (; c < head_dim; c += kLanes) {
    AddValuesTile<kRows, 1>(probs, values + c, num_tokens, head_dim, acc + c);
  }
}

template <typename T>
void AddValues(const float* probs, const T* values, int num_tokens, int num_rows, int head_dim,
               float* acc) {
  int row = 0;
  for (; row + kValueRows <= num_rows; row += kValueRows) {
    AddValuesRows<kValueRows>(probs + row * kGroupTokens, values, num_tokens, head_dim,
                              acc + row * head_dim);
  }
  probs += row * kGroupTokens;
  acc += row * head_dim;
  switch (num_rows - row) {
    case 3:
      return AddValuesRows<3>(probs, values, num_tokens, head_dim, acc);
    case 2:
      return AddValuesRows<2>(probs, values, num_tokens, head_dim, acc);
    case 1:
      return AddValuesRows<1>(probs, values, num_tokens, head_dim, acc);
    default:
      return;
  }
}

inline void Prefetch(const void* run, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    hwy::Prefetch(static_cast<const char*>(run) + at);
  }
}

template <typename T>
void AttendPartitionOf(const AttentionTile& tile, int64_t partition, const TileWorkspace& workspace,
                       const AttentionPartial& result) {
  const DF d;
  const int head_dim = tile.kv.layout.head_dim;
  const int heads = tile.heads_per_kv;
  const int num_rows = tile.num_rows();
  ClearPartial(result, num_rows, head_dim);
  std::fill_n(workspace.lane_sums, num_rows * kBlockTokens, 0.0f);

  const int64_t begin = std::max(partition * kPartitionTokens, tile.begin());
  const int64_t end = std::min((partition + 1) * kPartitionTokens, tile.end());
  const int64_t run_bytes = tile.kv.layout.head_run_elements() * int64_t{sizeof(T)};
  for (int64_t group = begin / kGroupTokens * kGroupTokens; group < end; group += kGroupTokens) {
    const int num_tokens = static_cast<int>(std::min<int64_t>(kGroupTokens, end - group));
    const int num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
    const int32_t* blocks = tile.block_table + group / kBlockTokens;
    for (int i = 0; i < kGroupBlocks; ++i) {
      if (group + kGroupTokens + i * kBlockTokens >= end) break;
      Prefetch(tile.kv.Keys<T>(blocks[kGroupBlocks + i], tile.kv_head), run_bytes);
      Prefetch(tile.kv.Values<T>(blocks[kGroupBlocks + i], tile.kv_head), run_bytes);
    }

    // Tokens of the tile that see some position of the group.
    const int64_t first_token = std::max<int64_t>(0, group - tile.first_position);
    const int64_t last_token = std::min<int64_t>(
        tile.num_tokens - 1, group + kGroupTokens - 2 + tile.window - tile.first_position);
    if (first_token > last_token) continue;
    const int first_row = static_cast<int>(first_token) * heads;
    const int rows = static_cast<int>(last_token - first_token + 1) * heads;
    float* scores = workspace.probs + first_row * kGroupTokens;
    float* acc = result.acc + first_row * head_dim;

    for (int i = 0; i < num_blocks; ++i) {
      TransposeKeys(tile.kv.Keys<T>(blocks[i], tile.kv_head), head_dim,
                    workspace.keys + i * kBlockTokens);
    }
    ScoreAllRows(workspace.queries + first_row * head_dim, workspace.keys, rows, head_dim, scores);

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
                  static_cast<int>(last), head_dim, &result.max[row],
                  workspace.lane_sums + row * kBlockTokens, result.acc + row * head_dim);
    }

    // Values past the last position that a row sees are not read: they may be anything.
    const bool convert = sizeof(T) == 2 && rows >= kConvertValuesRows;
    for (int i = 0; i < num_blocks; ++i) {
      const T* values = tile.kv.Values<T>(blocks[i], tile.kv_head);
      const int tokens = std::min(kBlockTokens, num_tokens - i * kBlockTokens);
      if (convert) {
        for (int at = 0; at < tokens * head_dim; at += kLanes) {
          hn::Store(LoadValues(values + at), d,
                    workspace.values + i * kBlockTokens * head_dim + at);
        }
      } else {
        AddValues(scores + i * kBlockTokens, values, tokens, rows, head_dim, acc);
      }
    }
    if (convert) AddValues(scores, workspace.values, num_tokens, rows, head_dim, acc);
  }
  for (int row = 0; row < num_rows; ++row) {
    result.sum[row] =
        hn::GetLane(hn::SumOfLanes(d, hn::Load(d, workspace.lane_sums + row * kBlockTokens)));
  }
}

void AttendPartitionTarget(const AttentionTile& tile, int64_t partition,
                           const TileWorkspace& workspace, const AttentionPartial& result) {
  switch (tile.kv.layout.dtype) {
    case DType::kBF16:
      return AttendPartitionOf<hwy::bfloat16_t>(tile, partition, workspace, result);
    case DType::kF16:
      return AttendPartitionOf<hwy::float16_t>(tile, partition, workspace, result);
    default:  // kF32: Attention() has checked
      return AttendPartitionOf<float>(tile, partition, workspace, result);
  }
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
