// Decodes one run of a GGUF block: the only place that knows the files' bit layouts. Inline for
// hosts and devices; everybody but packing kernels calls DecodeRun of kernels/quant_block.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"
#include "kernels/quant_block.h"
#include "kernels/weight.h"

namespace gloam::quant_decode {

inline constexpr uint32_t kLowNibbles = 0x0f0f0f0f;
inline constexpr uint32_t kLowBits = 0x01010101;

template <typename T>
GLOAM_HOST_DEVICE inline T Read(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

GLOAM_HOST_DEVICE inline uint32_t Word(const std::byte* p, int index) {
  return Read<uint32_t>(p + 4 * index);
}

// 16 bytes that hold elements 0..15 in their low and 16..31 in their high nibbles.
GLOAM_HOST_DEVICE inline void DecodeNibbles(const std::byte* bytes, QuantRun& run) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t word = Word(bytes, j);
    run.quants[j] = word & kLowNibbles;
    run.quants[j + 4] = (word >> 4) & kLowNibbles;
  }
}

// Bit e of `high` becomes bit 4 of element e.
GLOAM_HOST_DEVICE inline void AddFifthBits(uint32_t high, QuantRun& run) {
  for (int j = 0; j < 8; ++j) {
    const uint32_t four = (high >> (4 * j)) & 0xf;
    // Spreads four neighbouring bits to the low bits of four bytes.
    run.quants[j] |= ((four * 0x00204081u) & kLowBits) << 4;
  }
}

// The 12 bytes of a K-quant's eight 6-bit scales and eight 6-bit mins.
GLOAM_HOST_DEVICE inline void DecodeSubScales(const std::byte* packed, int sub, QuantRun& run) {
  const auto byte = [packed](int i) { return static_cast<unsigned>(packed[i]); };
  if (sub < 4) {
    run.sub_scales[0] = static_cast<int8_t>(byte(sub) & 63);
    run.sub_min = static_cast<uint8_t>(byte(sub + 4) & 63);
  } else {
    run.sub_scales[0] = static_cast<int8_t>((byte(sub + 4) & 0xf) | (byte(sub - 4) >> 6) << 4);
    run.sub_min = static_cast<uint8_t>(byte(sub + 4) >> 4 | (byte(sub) >> 6) << 4);
  }
}

// Q4_K: scale, min, 12 bytes of sub-scales, 128 of nibbles: 32 bytes serve two neighbouring runs.
// Q5_K: 32 bytes of fifth bits before the nibbles, bit `sub` of byte e belonging to element e.
GLOAM_HOST_DEVICE inline void DecodeQ45K(const std::byte* block, int sub, bool has_fifth_bits,
                                         QuantRun& run) {
  run.scale = Read<uint16_t>(block);
  run.min = Read<uint16_t>(block + 2);
  DecodeSubScales(block + 4, sub, run);
  const std::byte* high = block + 16;
  const std::byte* nibbles = high + (has_fifth_bits ? 32 : 0) + 32 * (sub / 2);
  for (int j = 0; j < 8; ++j) {
    run.quants[j] = (Word(nibbles, j) >> (4 * (sub % 2))) & kLowNibbles;
    if (has_fifth_bits) run.quants[j] |= ((Word(high, j) >> sub) & kLowBits) << 4;
  }
}

// Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 scales, the super-block's scale.
GLOAM_HOST_DEVICE inline void DecodeQ6K(const std::byte* block, int sub, QuantRun& run) {
  const int half = sub / 4;  // 128 elements share 64 bytes of nibbles and 32 of bit pairs
  const int quarter = sub % 4;
  const std::byte* nibbles = block + 64 * half + 32 * (quarter % 2);
  const std::byte* pairs = block + 128 + 32 * half;
  for (int j = 0; j < 8; ++j) {
    const uint32_t low = (Word(nibbles, j) >> (4 * (quarter / 2))) & kLowNibbles;
    const uint32_t high = (Word(pairs, j) >> (2 * quarter)) & 0x03030303;
    run.quants[j] = low | high << 4;
  }
  run.sub_scales[0] = Read<int8_t>(block + 192 + 2 * sub);
  run.sub_scales[1] = Read<int8_t>(block + 193 + 2 * sub);
  run.scale = Read<uint16_t>(block + 208);
}

// `block` is the first byte of the block that holds the run, `sub` the run's index in it, `type` a
// quantised type.
GLOAM_HOST_DEVICE inline QuantRun DecodeRunOfBlock(WeightType type, const std::byte* block,
                                                   int sub) {
  QuantRun run = {};
  run.scale = Read<uint16_t>(block);
  switch (type) {
    case WeightType::kQ4_0:
      DecodeNibbles(block + 2, run);
      break;
    case WeightType::kQ4_1:
      run.min = Read<uint16_t>(block + 2);
      DecodeNibbles(block + 4, run);
      break;
    case WeightType::kQ5_0:
      DecodeNibbles(block + 6, run);
      AddFifthBits(Read<uint32_t>(block + 2), run);
      break;
    case WeightType::kQ5_1:
      run.min = Read<uint16_t>(block + 2);
      DecodeNibbles(block + 8, run);
      AddFifthBits(Read<uint32_t>(block + 4), run);
      break;
    case WeightType::kQ8_0:
      // Signed bytes; adding 128 makes them unsigned.
      for (int j = 0; j < 8; ++j) run.quants[j] = Word(block + 2, j) ^ 0x80808080;
      break;
    case WeightType::kQ4_K:
      DecodeQ45K(block, sub, false, run);
      break;
    case WeightType::kQ5_K:
      DecodeQ45K(block, sub, true, run);
      break;
    case WeightType::kQ6_K:
      DecodeQ6K(block, sub, run);
      break;
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;  // not quantised
  }
  return run;
}

}  // namespace gloam::quant_decode
