#include "kernels/quant_block.h"

#include <bit>
#include <cstring>

#include "base/check.h"

namespace gloam {
namespace {

constexpr uint32_t kLowNibbles = 0x0f0f0f0f;
constexpr uint32_t kLowBits = 0x01010101;

static_assert(std::endian::native == std::endian::little, "GGUF files are little-endian");

template <typename T>
T Read(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

uint32_t Word(const std::byte* p, int index) { return Read<uint32_t>(p + 4 * index); }

// 16 bytes that hold elements 0..15 in their low and 16..31 in their high nibbles.
void DecodeNibbles(const std::byte* bytes, QuantRun& run) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t word = Word(bytes, j);
    run.quants[j] = word & kLowNibbles;
    run.quants[j + 4] = (word >> 4) & kLowNibbles;
  }
}

// Bit e of `high` becomes bit 4 of element e.
void AddFifthBits(uint32_t high, QuantRun& run) {
  for (int j = 0; j < 8; ++j) {
    const uint32_t four = (high >> (4 * j)) & 0xf;
    // Spreads four neighbouring bits to the low bits of four bytes.
    run.quants[j] |= ((four * 0x00204081u) & kLowBits) << 4;
  }
}

// The 12 bytes of a K-quant's eight 6-bit scales and eight 6-bit mins.
void DecodeSubScales(const std::byte* packed, int sub, QuantRun& run) {
  const auto byte = [packed](int i) { return std::to_integer<unsigned>(packed[i]); };
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
void DecodeQ45K(const std::byte* block, int sub, bool has_fifth_bits, QuantRun& run) {
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
void DecodeQ6K(const std::byte* block, int sub, QuantRun& run) {
  const int half = sub / 4;  // 128 elements share 64 bytes of nibbles and 32 of bit pairs
  const int quarter = sub % 4;
  const std::byte* nibbles = block + 64 * half + 32 * (quarter % 2);
  const std::byte* pairs = block + 128 + 32 * half;
  for (int j = 0; j < 8; ++j) {
    const uint32_t low = (Word(nibbles, j) >> (4 * (quarter / 2))) & kLowNibbles;
    const uint32_t high = (Word(pairs, j) >> (2 * quarter)) & 0x03030303;
    run.quants[j] = low | high << 4;
  }
  run.sub_scales = {Read<int8_t>(block + 192 + 2 * sub), Read<int8_t>(block + 193 + 2 * sub)};
  run.scale = Read<uint16_t>(block + 208);
}

}  // namespace

bool IsQuantized(WeightType type) { return InfoOf(type).block_elements > 1; }

const QuantTraits& QuantTraitsOf(WeightType type) {
  static constexpr QuantTraits kQ4_0 = {4, 8, false, false, 1};
  static constexpr QuantTraits kQ4_1 = {4, 0, true, false, 1};
  static constexpr QuantTraits kQ5_0 = {5, 16, false, false, 1};
  static constexpr QuantTraits kQ5_1 = {5, 0, true, false, 1};
  static constexpr QuantTraits kQ8_0 = {8, 128, false, false, 1};
  static constexpr QuantTraits kQ4_K = {4, 0, true, true, 1};
  static constexpr QuantTraits kQ5_K = {5, 0, true, true, 1};
  static constexpr QuantTraits kQ6_K = {6, 32, false, true, 2};
  switch (type) {
    case WeightType::kQ4_0:
      return kQ4_0;
    case WeightType::kQ4_1:
      return kQ4_1;
    case WeightType::kQ5_0:
      return kQ5_0;
    case WeightType::kQ5_1:
      return kQ5_1;
    case WeightType::kQ8_0:
      return kQ8_0;
    case WeightType::kQ4_K:
      return kQ4_K;
    case WeightType::kQ5_K:
      return kQ5_K;
    case WeightType::kQ6_K:
      return kQ6_K;
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  GLOAM_CHECK(!"a quantised weight type");
  return kQ8_0;
}

QuantRun DecodeRun(WeightType type, const std::byte* row, int64_t run_index) {
  const WeightTypeInfo& info = InfoOf(type);
  const int64_t runs_per_block = info.block_elements / kRunElements;
  const std::byte* block = row + run_index / runs_per_block * info.block_bytes;
  const int sub = static_cast<int>(run_index % runs_per_block);
  QuantRun run;
  run.scale = Read<uint16_t>(block);
  switch (type) {
    case WeightType::kQ4_0:
      DecodeNibbles(block + 2, run);
      return run;
    case WeightType::kQ4_1:
      run.min = Read<uint16_t>(block + 2);
      DecodeNibbles(block + 4, run);
      return run;
    case WeightType::kQ5_0:
      DecodeNibbles(block + 6, run);
      AddFifthBits(Read<uint32_t>(block + 2), run);
      return run;
    case WeightType::kQ5_1:
      run.min = Read<uint16_t>(block + 2);
      DecodeNibbles(block + 8, run);
      AddFifthBits(Read<uint32_t>(block + 4), run);
      return run;
    case WeightType::kQ8_0:
      // Signed bytes; adding 128 makes them unsigned.
      for (int j = 0; j < 8; ++j) run.quants[j] = Word(block + 2, j) ^ 0x80808080;
      return run;
    case WeightType::kQ4_K:
      DecodeQ45K(block, sub, false, run);
      return run;
    case WeightType::kQ5_K:
      DecodeQ45K(block, sub, true, run);
      return run;
    case WeightType::kQ6_K:
      DecodeQ6K(block, sub, run);
      return run;
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  GLOAM_CHECK(!"a quantised weight type");
  return run;
}

}  // namespace gloam
