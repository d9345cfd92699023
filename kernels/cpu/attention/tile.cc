#include "kernels/cpu/attention/tile.h"

#include <algorithm>
#include <cfloat>
#include <limits>

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention/tile.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"
#include "kernels/cpu/attention/rows-inl.h"
#include "kernels/cpu/attention/scores-inl.h"
#include "kernels/cpu/attention/values-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

// Rows up to which transposing a group's keys costs more than it saves.
constexpr int kUntransposedRows = 8;
// Rows from which it pays to convert a group's values to fp32 once instead of once per 4 rows.
constexpr int kConvertValuesRows = 2 * kValueRows;

// e^x of x <= 0 to 2 ulp; 0 where that is below the least normal number.
inline VF ExpOf(VF x) {
  const DF d;
  const hn::Repartition<uint32_t, DF> d32;
  // In a sum with 1.5 * 2^23 the last bits are the number of halvings.
  const VF magic = hn::Set(d, 12582912.0f);
  const VF shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), magic);
  const VF r = hn::NegMulAdd(hn::Sub(shifted, magic), hn::Set(d, 0.693147181f), x);
  VF poly = hn::Set(d, 1.9875691500e-4f);  // of (e^r - 1 - r) / r^2, |r| < 0.35 (Cephes)
  for (const float term :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    poly = hn::MulAdd(poly, r, hn::Set(d, term));
  }
  const VF mantissa = hn::Add(hn::MulAdd(poly, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(d32, shifted));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(d, -87.0f)),
                            hn::BitCast(d, hn::Add(hn::BitCast(d32, mantissa), exponent)));
}

// One step of a row's online softmax: scores become probabilities relative to the running maximum.
// Tokens outside [first, last] of the group are masked.
inline void SoftmaxStep(float* HWY_RESTRICT scores, int first, int last, int head_dim, float* max,
                        float* HWY_RESTRICT lane_sums, float* HWY_RESTRICT acc) {
  const DF d;
  constexpr int kVectors = kGroupTokens / kLanes;
  VF probs[kVectors];
  HWY_UNROLL(8)
  for (int v = 0; v < kVectors; ++v) probs[v] = hn::Load(d, scores + v * kLanes);
  if (first > 0 || last < kGroupTokens - 1) {
    const VF masked = hn::Set(d, -std::numeric_limits<float>::infinity());
    const VF lower = hn::Set(d, static_cast<float>(first));
    const VF upper = hn::Set(d, static_cast<float>(last));
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      const VF token = hn::Iota(d, static_cast<float>(v * kLanes));
      const auto seen = hn::And(hn::Ge(token, lower), hn::Le(token, upper));
      probs[v] = hn::IfThenElse(seen, probs[v], masked);
    }
  }
  VF largest = probs[0];
  HWY_UNROLL(8)
  for (int v = 1; v < kVectors; ++v) largest = hn::Max(largest, probs[v]);
  VF sum = hn::Load(d, lane_sums);
  VF reference = hn::Set(d, *max);
  if (!hn::AllFalse(d, hn::Gt(largest, reference))) {
    const float group_max = hn::GetLane(hn::MaxOfLanes(d, largest));
    const VF shrink = ExpOf(hn::Set(d, *max - group_max));
    *max = group_max;
    reference = hn::Set(d, group_max);
    sum = hn::Mul(sum, shrink);
    for (int c = 0; c < head_dim; c += kLanes) {
      hn::Store(hn::Mul(hn::Load(d, acc + c), shrink), d, acc + c);
    }
  }
  HWY_UNROLL(8)
  for (int v = 0; v < kVectors; ++v) {
    probs[v] = ExpOf(hn::Sub(probs[v], reference));
    sum = hn::Add(sum, probs[v]);
  }
  hn::Store(sum, d, lane_sums);
  HWY_UNROLL(8)
  for (int v = 0; v < kVectors; ++v) hn::Store(probs[v], d, scores + v * kLanes);
}

// Scores of tokens without a bit in `seen` become minus infinity.
inline void MaskScores(uint32_t seen, float* scores) {
  if (seen == std::numeric_limits<uint32_t>::max()) return;
  for (int token = 0; token < kGroupTokens; ++token) {
    if ((seen >> token & 1) == 0) scores[token] = -std::numeric_limits<float>::infinity();
  }
}

// The keys and values of one KV head of a tile in a group.
template <typename T, bool kListed>
struct GroupRows {
  const AttentionTile& tile;
  int head;       // of the tile
  int64_t first;  // position
  int num_tokens;
  HeadBlocks next;  // what is read a group later; of tiles without `rows`

  int head_dim() const { return tile.kv.layout.head_dim; }
  int num_blocks() const { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }
  auto Keys(int i) const { return RowsOfBlock(/*values=*/false, i); }
  auto Values(int i) const { return RowsOfBlock(/*values=*/true, i); }

 private:
  auto RowsOfBlock(bool values, int i) const {
    if constexpr (kListed) {
      const int64_t at = first + i * kBlockTokens;
      return ListedRows<T>{tile.rows + at, values ? tile.values_offset : 0,
                           head_dim() * static_cast<int64_t>(sizeof(T)),
                           std::clamp<int64_t>(tile.end() - at - kGroupTokens, 0, kBlockTokens)};
    } else {
      const auto run = [&](int32_t block, int kv_head) {
        return values ? tile.kv.Values<const T>(block, kv_head)
                      : tile.kv.Keys<const T>(block, kv_head);
      };
      const bool has_next = i < next.num_blocks && head < next.num_kv_heads;
      return BlockRows<T>{run(tile.block_table[first / kBlockTokens + i], tile.kv_head + head),
                          head_dim(),
                          has_next ? run(next.blocks[i], next.kv_head + head) : nullptr};
    }
  }
};

// Scores of all rows with a group's tokens in fp32.
template <typename T, bool kListed>
void ScoreGroup(const GroupRows<T, kListed>& group, const float* queries, int num_rows,
                const TileWorkspace& workspace, float* scores) {
  const int head_dim = group.head_dim();
  const bool transpose = !kListed && num_rows > kUntransposedRows;
  for (int i = 0; i < group.num_blocks(); ++i) {
    const auto keys = group.Keys(i);
    if (transpose) {
      keys.PrefetchNext(0, kBlockTokens);
      TransposeKeys(keys[0], head_dim, workspace.keys + i * kBlockTokens);
    } else {
      ScoreFewRows(queries, keys, num_rows, head_dim, scores + i * kBlockTokens);
    }
  }
  if (transpose) ScoreAllRows(queries, workspace.keys, num_rows, head_dim, scores);
}

// acc[row] += probabilities times a group's values in fp32. Values past the last token are not
// read: they may be anything.
template <typename T, bool kListed>
void AddGroup(const GroupRows<T, kListed>& group, const float* probs, int num_rows,
              const TileWorkspace& workspace, float* acc) {
  const DF d;
  const int head_dim = group.head_dim();
  const int last = group.num_blocks() - 1;
  const decltype(group.Values(0)) blocks[kGroupBlocks] = {group.Values(0), group.Values(last)};
  if (sizeof(T) != 2 || num_rows < kConvertValuesRows) {
    return AddValues(probs, blocks, group.num_tokens, num_rows, head_dim, acc);
  }
  float* to = workspace.values;
  for (int token = 0; token < group.num_tokens; ++token, to += head_dim) {
    const auto& values = blocks[token / kBlockTokens];
    if (token % kBlockTokens == 0) values.PrefetchNext(0, kBlockTokens);
    ForChannels(head_dim, [&](int channel, const auto& load) HWY_ATTR {
      hn::Store(load(values[token % kBlockTokens]), d, to + channel);
    });
  }
  const BlockRows<float> converted[kGroupBlocks] = {
      {workspace.values, head_dim}, {workspace.values + kBlockTokens * head_dim, head_dim}};
  AddValues(probs, converted, group.num_tokens, num_rows, head_dim, acc);
}

// What a tile says about the scores of a group's tokens instead of q . k.
void OverrideScores(const AttentionTile& tile, int64_t group, int num_rows, float* scores) {
  for (int row = 0; row < num_rows; ++row, scores += kGroupTokens) {
    if (tile.logits != nullptr) {
      std::copy_n(tile.logits + row * tile.logits_stride + group, kGroupTokens, scores);
    }
    if (tile.row_masks != nullptr) {
      MaskScores(tile.row_masks[row * tile.row_mask_stride + group / kGroupTokens], scores);
    }
  }
}

// The part of AttendPartition that the rows of some neighbouring KV heads of the tile have in one
// group: scores of all heads, then probabilities, then values. So the keys and the values of all
// heads are read in the order in which they lie in memory, and no step waits for the one before it.
template <typename T, bool kListed>
void AttendGroup(const AttentionTile& tile, int first_head, int end_head, int64_t group,
                 int64_t end, const HeadBlocks& next, const float* queries,
                 const TileWorkspace& workspace, const AttentionPartial& result) {
  // Tokens of the tile that see some position of the group.
  const int64_t first_token = std::max<int64_t>(0, group - tile.first_position);
  const int64_t last_token = std::min<int64_t>(
      tile.num_tokens - 1, group + kGroupTokens - 2 + tile.window - tile.first_position);
  if (first_token > last_token) return;
  const int head_dim = tile.kv.layout.head_dim;
  const int heads = tile.heads_per_kv;
  const int first_row = static_cast<int>(first_token) * heads;  // of each head
  const int rows = static_cast<int>(last_token - first_token + 1) * heads;
  const auto rows_of = [&](int head) {
    return GroupRows<T, kListed>{
        tile, head, group, static_cast<int>(std::min<int64_t>(kGroupTokens, end - group)), next};
  };
  const auto first_row_of = [&](int head) {
    return int64_t{head} * tile.rows_per_kv_head() + first_row;
  };

  const auto for_heads = [&](const auto& f) HWY_ATTR {
    for (int head = first_head; head < end_head; ++head) {
      f(head, workspace.probs + first_row_of(head - first_head) * kGroupTokens);
    }
  };

  for_heads([&](int head, float* scores) HWY_ATTR {
    ScoreGroup(rows_of(head), queries + first_row_of(head) * head_dim, rows, workspace, scores);
  });
  for_heads([&](int head, float* scores) HWY_ATTR {
    OverrideScores(tile, group, rows, scores);
    for (int i = 0; i < rows; ++i) {
      const int64_t position = tile.first_position + (first_row + i) / heads;
      const int64_t first = std::max<int64_t>(0, position - tile.window + 1 - group);
      const int64_t last = std::min<int64_t>(kGroupTokens - 1, position - group);
      const int64_t row = first_row_of(head) + i;
      SoftmaxStep(scores + i * kGroupTokens, static_cast<int>(first), static_cast<int>(last),
                  head_dim, &result.max[row], workspace.lane_sums + row * kBlockTokens,
                  result.acc + row * head_dim);
    }
  });
  for_heads([&](int head, const float* probs) HWY_ATTR {
    AddGroup(rows_of(head), probs, rows, workspace, result.acc + first_row_of(head) * head_dim);
  });
}

template <typename T, bool kListed>
void AttendPartitionOf(const AttentionTile& tile, int64_t partition, const TileWorkspace& workspace,
                       const AttentionPartial& result) {
  const DF d;
  const int head_dim = tile.kv.layout.head_dim;
  const int num_rows = tile.num_rows();
  ClearPartial(result, num_rows, head_dim);
  std::fill_n(workspace.lane_sums, num_rows * kBlockTokens, 0.0f);
  const float* queries = kHasPairs<T> ? workspace.ordered_queries : workspace.queries;
  for (int row = 0; kHasPairs<T> && row < num_rows; ++row) {
    OrderChannels(workspace.queries + row * head_dim, head_dim,
                  workspace.ordered_queries + row * head_dim);
  }

  const int64_t begin = std::max(partition * kPartitionTokens, tile.begin());
  const int64_t end = std::min((partition + 1) * kPartitionTokens, tile.end());
  for (int64_t group = begin / kGroupTokens * kGroupTokens; group < end; group += kGroupTokens) {
    const int64_t left = end - group - kGroupTokens;
    HeadBlocks next = tile.next;
    if (left > 0) {
      next = {tile.kv_head, tile.num_kv_heads,
              tile.block_table + (group + kGroupTokens) / kBlockTokens,
              (std::min<int64_t>(left, kGroupTokens) + kBlockTokens - 1) / kBlockTokens};
    }
    for (int head = 0; head < tile.num_kv_heads; head += kHeadsAtOnce) {
      AttendGroup<T, kListed>(tile, head, std::min(head + kHeadsAtOnce, tile.num_kv_heads), group,
                              end, next, queries, workspace, result);
    }
  }
  for (int row = 0; kHasPairs<T> && row < num_rows; ++row) {
    // The queries are not needed any more.
    float* ordered = workspace.ordered_queries;
    std::copy_n(result.acc + row * head_dim, head_dim, ordered);
    RestoreChannels(ordered, head_dim, result.acc + row * head_dim);
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
