// P V of a group, once per instruction set.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention/rows-inl.h"
#include "kernels/cpu/attention/tile.h"

#if defined(GLOAM_ATTENTION_VALUES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ATTENTION_VALUES_INL_H
#undef GLOAM_ATTENTION_VALUES_INL_H
#else
#define GLOAM_ATTENTION_VALUES_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// A register tile is 4 rows x 4 vectors, with 16 registers less.
constexpr int kValueRows = 4;
// Vectors of values beside so many rows: enough sums to hide the latency of an addition.
constexpr int ValueVectors(int num_rows) {
  if (kManyRegisters) return num_rows <= 2 ? 8 : 4;
  return HWY_TARGET <= HWY_AVX2 && num_rows < kValueRows ? 4 : 2;
}

// Some vectors of channels: kFirst of the first half of the paired ones and kSecond of the second,
// both from `at` on. Neither: what has no partner.
template <int kFirst, int kSecond>
struct ValueChannels {
  static constexpr int kVectors = kFirst + kSecond == 0 ? 1 : kFirst + kSecond;
  int at;
  int num_paired;

  HWY_INLINE int Begin(int v) const {
    if (kFirst + kSecond == 0) return num_paired;
    return at + (v < kFirst ? v * kLanes : num_paired / 2 + (v - kFirst) * kLanes);
  }
  // Calls f(v, vector) for every vector of a row's.
  template <typename T, typename F>
  HWY_INLINE void ForEach(const T* row, const F& f) const {
    if constexpr (kFirst + kSecond == 0) f(0, LoadChannels(row + num_paired));
    HWY_UNROLL(8)
    for (int v = 0; v < kFirst; ++v) f(v, LoadHalf<0>(row, at + v * kLanes, num_paired));
    HWY_UNROLL(8)
    for (int v = 0; v < kSecond; ++v) f(kFirst + v, LoadHalf<1>(row, at + v * kLanes, num_paired));
  }
};

// acc[row][c] += sum over a group's tokens, ascending, of probs[row][token] * values[token][c], for
// kRows rows and some channels. A function of its own so that its sums have the registers.
template <int kRows, typename Channels, typename Rows>
HWY_NOINLINE void AddValuesTile(const float* HWY_RESTRICT probs, const Rows* blocks, int num_tokens,
                                const Channels& channels, bool prefetch, int head_dim,
                                float* HWY_RESTRICT acc) {
  const DF d;
  constexpr int kVectors = Channels::kVectors;
  VF sums[kRows][kVectors];
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = hn::Load(d, acc + r * head_dim + channels.Begin(v));
    }
  }
  for (; num_tokens > 0; num_tokens -= kBlockTokens, ++blocks, probs += kBlockTokens) {
    const Rows& values = *blocks;
    const int end = std::min(num_tokens, kBlockTokens);
    for (int token = 0; token < end; ++token) {
      if (prefetch && token % 4 == 0) values.PrefetchNext(token, 4);
      VF prob[kRows];
      HWY_UNROLL(8)
      for (int r = 0; r < kRows; ++r) prob[r] = hn::Set(d, probs[r * kGroupTokens + token]);
      channels.ForEach(values[token], [&](int v, VF value) HWY_ATTR {
        HWY_UNROLL(8)
        for (int r = 0; r < kRows; ++r) sums[r][v] = hn::MulAdd(prob[r], value, sums[r][v]);
      });
    }
  }
  HWY_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(8)
    for (int v = 0; v < kVectors; ++v) {
      hn::Store(sums[r][v], d, acc + r * head_dim + channels.Begin(v));
    }
  }
}

template <int kRows, typename Rows>
void AddValuesRows(const float* probs, const Rows* blocks, int num_tokens, int head_dim,
                   bool prefetch, float* acc) {
  constexpr int kMost = ValueVectors(kRows);
  const int num_paired = NumPaired(head_dim);
  const int half = num_paired / 2;
  const auto add = [&](const auto& channels, bool first) HWY_ATTR {
    // The first channels ask for what comes next.
    AddValuesTile<kRows>(probs, blocks, num_tokens, channels, first && prefetch, head_dim, acc);
  };
  int at = 0;
  if constexpr (kManyRegisters) {
    constexpr int kEach = kMost / 2;
    for (; at + kEach * kLanes <= half; at += kEach * kLanes) {
      add(ValueChannels<kEach, kEach>{at, num_paired}, at == 0);
    }
  } else {
    for (; at + kMost * kLanes <= half; at += kMost * kLanes) {
      add(ValueChannels<kMost, 0>{at, num_paired}, at == 0);
      add(ValueChannels<0, kMost>{at, num_paired}, false);
    }
  }
  for (; at < half; at += kLanes) add(ValueChannels<1, 1>{at, num_paired}, at == 0);
  if (num_paired < head_dim) add(ValueChannels<0, 0>{0, num_paired}, at == 0);
}

// The values are one after the other in `blocks`, 16 in each.
template <typename Rows>
void AddValues(const float* probs, const Rows* blocks, int num_tokens, int num_rows, int head_dim,
               float* acc) {
  int row = 0;
  for (; row + kValueRows <= num_rows; row += kValueRows) {
    AddValuesRows<kValueRows>(probs + row * kGroupTokens, blocks, num_tokens, head_dim, row == 0,
                              acc + row * head_dim);
  }
  probs += row * kGroupTokens;
  acc += row * head_dim;
  switch (num_rows - row) {
    case 3:
      return AddValuesRows<3>(probs, blocks, num_tokens, head_dim, row == 0, acc);
    case 2:
      return AddValuesRows<2>(probs, blocks, num_tokens, head_dim, row == 0, acc);
    case 1:
      return AddValuesRows<1>(probs, blocks, num_tokens, head_dim, row == 0, acc);
    default:
      return;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
