// Rows of keys and values as vectors, once per instruction set: the order of channels, where rows
// lie, transposition of a block's keys.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/attention/tile.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/float16.h"

#if defined(GLOAM_ATTENTION_ROWS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_ATTENTION_ROWS_INL_H
#undef GLOAM_ATTENTION_ROWS_INL_H
#else
#define GLOAM_ATTENTION_ROWS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kBlockTokens>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));

// 32 vector registers instead of 16 or fewer.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;

inline float ToFloat(float value) { return value; }
inline float ToFloat(hwy::bfloat16_t value) { return FloatFromBf16(value.bits); }
inline float ToFloat(hwy::float16_t value) { return F16ToF32(value.bits); }

// The order of channels in vectors. With a bf16 cache (but for scalars) those with even numbers
// come first, then the odd ones: a shift and a mask make two vectors of a vector of pairs, where
// widening takes twice the instructions. What remains beside whole vectors of pairs stays behind
// them as it is. Inside a partition the queries and the results have the same order.
constexpr int kPairedChannels = 2 * kLanes;
template <typename T>
constexpr bool kHasPairs = std::is_same_v<T, hwy::bfloat16_t> && (HWY_TARGET != HWY_SCALAR);

// Channels that have a partner.
inline int NumPaired(int head_dim) { return head_dim / kPairedChannels * kPairedChannels; }

// Writes keys of one block, [16][row_words] as 32-bit words, as fp32 columns of `out`,
// [head_dim][kGroupTokens], channels in the order of vectors. A word is one fp32 or a pair of
// 16-bit floats, the lower channel in the low half.
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
  const int num_paired = NumPaired(head_dim);
  const int64_t row_words = head_dim / kPerWord;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block);
  const auto store = [&](auto word, int index, int token) HWY_ATTR {
    const auto bits = hn::BitCast(d32, word);
    float* to = out + index * kPerWord * kGroupTokens + token;
    if constexpr (kPerWord == 1) {
      hn::Store(hn::BitCast(df, bits), df, to);
    } else if constexpr (std::is_same_v<T, hwy::float16_t>) {
      hn::Store(PromoteF16(bits), df, to);
      hn::Store(PromoteF16(hn::ShiftRight<16>(bits)), df, to + kGroupTokens);
    } else {
      const bool is_paired = 2 * index < num_paired;
      float* even = out + (is_paired ? index : 2 * index) * kGroupTokens + token;
      float* odd = even + (is_paired ? num_paired / 2 : 1) * kGroupTokens;
      hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(bits)), df, even);
      hn::Store(hn::BitCast(df, hn::And(bits, hn::Set(d32, 0xffff0000u))), df, odd);
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
      store(hn::InterleaveLower(d64, a, b), word + 0, token);
      store(hn::InterleaveUpper(d64, a, b), word + 1, token);
      store(hn::InterleaveLower(d64, c, d), word + 2, token);
      store(hn::InterleaveUpper(d64, c, d), word + 3, token);
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

// Vector `at` of the first (0) or the second (1) half of a row's paired channels.
template <int kHalf, typename T>
inline VF LoadHalf(const T* row, int at, int num_paired) {
  if constexpr (kHasPairs<T>) {
    const hn::Repartition<uint32_t, DF> d32;
    const auto pairs = hn::LoadU(d32, reinterpret_cast<const uint32_t*>(row) + at);
    if constexpr (kHalf == 0) return hn::BitCast(DF(), hn::ShiftLeft<16>(pairs));
    // Where registers are few a mask would drive a sum out of them.
    if constexpr (!kManyRegisters) {
      return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::ShiftRight<16>(pairs)));
    }
    return hn::BitCast(DF(), hn::And(pairs, hn::Set(d32, 0xffff0000u)));
  } else {
    return LoadChannels(row + kHalf * num_paired / 2 + at);
  }
}

// Calls f(channel, load) for every vector of channels: load(row) gives a row's.
template <typename F>
HWY_INLINE void ForChannels(int head_dim, const F& f) {
  const int num_paired = NumPaired(head_dim);
  const int half = num_paired / 2;
  for (int at = 0; at < half; at += kLanes) {
    f(at, [=](const auto* row) HWY_ATTR { return LoadHalf<0>(row, at, num_paired); });
  }
  for (int at = 0; at < half; at += kLanes) {
    f(half + at, [=](const auto* row) HWY_ATTR { return LoadHalf<1>(row, at, num_paired); });
  }
  if (num_paired < head_dim) {
    f(num_paired, [=](const auto* row) HWY_ATTR { return LoadChannels(row + num_paired); });
  }
}

// Keys or values of one block, by token: one after another, or each at an address of its own. A
// group of tokens is asked for while the one before it is computed: what comes a group later has
// the same place there, so that it comes in the order and at the pace in which it is read.
template <typename T>
struct BlockRows {
  const T* data;
  int64_t head_dim;
  const T* next = nullptr;  // a group later, or null
  HWY_INLINE const T* operator[](int token) const { return data + token * head_dim; }
  HWY_INLINE void PrefetchNext(int token, int count) const {
    if (next != nullptr) PrefetchRange(next + token * head_dim, count * head_dim * sizeof(T));
  }
};
template <typename T>
struct ListedRows {
  const std::byte* const* rows;
  int64_t offset_bytes;
  int64_t row_bytes;
  int64_t num_next;  // a group later
  HWY_INLINE const T* operator[](int token) const {
    return reinterpret_cast<const T*>(rows[token] + offset_bytes);
  }
  HWY_INLINE void PrefetchNext(int token, int count) const {
    const int64_t end = std::min<int64_t>(num_next, token + count);
    for (int64_t i = token; i < end; ++i) {
      PrefetchRange(rows[kGroupTokens + i] + offset_bytes, row_bytes);
    }
  }
};

// From the channels' own order to that of vectors, and back.
void OrderChannels(const float* in, int head_dim, float* out) {
  const DF d;
  const int num_paired = NumPaired(head_dim);
  for (int c = 0; c < num_paired; c += kPairedChannels) {
    VF even, odd;
    hn::LoadInterleaved2(d, in + c, even, odd);
    hn::Store(even, d, out + c / 2);
    hn::Store(odd, d, out + (num_paired + c) / 2);
  }
  if (num_paired < head_dim) hn::Store(hn::Load(d, in + num_paired), d, out + num_paired);
}
void RestoreChannels(const float* in, int head_dim, float* out) {
  const DF d;
  const int num_paired = NumPaired(head_dim);
  for (int c = 0; c < num_paired; c += kPairedChannels) {
    const VF even = hn::Load(d, in + c / 2);
    const VF odd = hn::Load(d, in + (num_paired + c) / 2);
    hn::StoreInterleaved2(even, odd, d, out + c);
  }
  if (num_paired < head_dim) hn::Store(hn::Load(d, in + num_paired), d, out + num_paired);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
