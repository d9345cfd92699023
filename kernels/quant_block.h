// GGUF's quantised formats seen as one: runs of 32 unsigned integers with their scales.
// Decoding a run is the only place that knows the files' bit layouts; the reference
// (DequantizeRow) and every backend's packing start from it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/check.h"
#include "kernels/weight.h"

namespace gloam {

inline constexpr int kRunElements = 32;

// How the integers of a type become weights: with s = scale * sub_scale (exact in fp32),
//   symmetric:  w = s * (q - offset)
//   with min:   w = s * q - m, where m = min * sub_min (or -min where the type has no sub_min)
struct QuantTraits {
  int bits;    // of one quant: 4, 5, 6 or 8
  int offset;  // 0 for types with a min
  bool has_min;
  bool is_k_quant;     // super-blocks of 256 elements with integer sub-scales
  int scales_per_run;  // 1, or 2 (Q6_K: one per 16 elements)
};

// For quantised types only.
constexpr QuantTraits QuantTraitsOf(WeightType type) {
  switch (type) {
    case WeightType::kQ4_0:
      return {4, 8, false, false, 1};
    case WeightType::kQ4_1:
      return {4, 0, true, false, 1};
    case WeightType::kQ5_0:
      return {5, 16, false, false, 1};
    case WeightType::kQ5_1:
      return {5, 0, true, false, 1};
    case WeightType::kQ8_0:
      return {8, 128, false, false, 1};
    case WeightType::kQ4_K:
      return {4, 0, true, true, 1};
    case WeightType::kQ5_K:
      return {5, 0, true, true, 1};
    case WeightType::kQ6_K:
      return {6, 32, false, true, 2};
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  GLOAM_CHECK(!"a quantised weight type");
  return {};
}

bool IsQuantized(WeightType type);

// Elements [32 * run, 32 * run + 32) of a row, as stored.
struct QuantRun {
  // Byte i of word j (little-endian) is the quant of element 4 * j + i.
  std::array<uint32_t, 8> quants;
  uint16_t scale = 0;                     // fp16
  uint16_t min = 0;                       // fp16; as stored: added for Q4_1 and Q5_1, times sub_min
                                          // subtracted for K-quants
  std::array<int8_t, 2> sub_scales = {};  // K-quants; the second only for Q6_K
  uint8_t sub_min = 0;                    // Q4_K, Q5_K
};

// `row` is the first byte of a row of `type`.
QuantRun DecodeRun(WeightType type, const std::byte* row, int64_t run);

}  // namespace gloam
