// Random weights as a model file would hold them, for tests of the backends. Host memory.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/quant_block.h"
#include "kernels/weight.h"

namespace gloam {

inline constexpr WeightType kAllTypes[] = {
    WeightType::kF32,  WeightType::kF16,  WeightType::kBF16, WeightType::kQ4_0,
    WeightType::kQ4_1, WeightType::kQ5_0, WeightType::kQ5_1, WeightType::kQ8_0,
    WeightType::kQ4_K, WeightType::kQ5_K, WeightType::kQ6_K,
};

// Columns that end inside a chunk of 256 elements where the type allows it.
inline int64_t RaggedCols(WeightType type) {
  const int block = InfoOf(type).block_elements;
  return block == 256 ? 512 : block == 32 ? 352 : 301;
}

// A random matrix as a file would hold it; the masks change all bytes but the fp16 scales.
struct RandomWeight {
  std::vector<std::byte> bytes;
  RawWeight raw;

  RandomWeight(WeightType type, int64_t rows, int64_t cols, std::mt19937& rng,
               uint32_t and_mask = 0xff, uint32_t or_mask = 0) {
    bytes.resize(rows * RowBytes(type, cols));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>((rng() & and_mask) | or_mask);
    raw = {bytes.data(), type, rows, cols};
    const auto put16 = [&](size_t at, uint32_t value) { std::memcpy(&bytes[at], &value, 2); };
    // fp16 of 2^-7..2^-4, either sign.
    const auto f16 = [&] { return (rng() & 0x83ff) | (8 + rng() % 4) << 10; };
    const WeightTypeInfo& info = InfoOf(type);
    const size_t num_blocks = bytes.size() / info.block_bytes;
    for (size_t block = 0; block < num_blocks; ++block) {
      const size_t at = block * info.block_bytes;
      if (type == WeightType::kF32) {
        const float value = std::normal_distribution<float>()(rng);
        std::memcpy(&bytes[at], &value, 4);
      } else if (type == WeightType::kBF16) {
        put16(at, (rng() & 0x807f) | (120 + rng() % 8) << 7);
      } else if (type == WeightType::kQ6_K) {
        put16(at + 208, f16());
      } else {
        put16(at, f16());
        const bool has_min = info.block_elements > 1 && QuantTraitsOf(type).has_min;
        if (has_min) put16(at + 2, f16());
      }
    }
  }

  std::vector<float> Dequantized() const {
    std::vector<float> values(raw.rows * raw.cols);
    for (int64_t row = 0; row < raw.rows; ++row) {
      DequantizeRow(raw, row, values.data() + row * raw.cols);
    }
    return values;
  }

  // Of every element the magnitudes of the terms it is made of, summed: a weight with a min is a
  // difference of two larger terms.
  std::vector<float> TermSizes() const {
    std::vector<float> sizes = Dequantized();
    for (float& size : sizes) size = std::fabs(size);
    if (!IsQuantized(raw.type) || !QuantTraitsOf(raw.type).has_min) return sizes;
    for (int64_t i = 0; i < raw.rows * raw.cols / kRunElements; ++i) {
      const int64_t row = i * kRunElements / raw.cols;
      const std::byte* data = raw.data + row * RowBytes(raw.type, raw.cols);
      const QuantRun run = DecodeRun(raw.type, data, i % (raw.cols / kRunElements));
      // 0.125 bounds the fp16 values that the constructor makes.
      const float min = 0.125f * (QuantTraitsOf(raw.type).is_k_quant ? run.sub_min : 1);
      for (int e = 0; e < kRunElements; ++e) sizes[i * kRunElements + e] += 2 * min;
    }
    return sizes;
  }
};

}  // namespace gloam
