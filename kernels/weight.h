// Weights: what a model file holds (WeightType, RawWeight) and what a backend makes of it (Weight).
// Raw weights point into the mapped file; a backend repacks them once at load and keeps the file's
// precision (a 4-bit weight stays 4 bits in memory). Immutable after loading; any thread may read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace gloam {

// Element types of weight matrices: plain floats, and GGUF's block formats.
enum class WeightType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};

struct WeightTypeInfo {
  std::string_view name;  // as GGUF's tools print it: "F32", "Q4_1", ...
  int block_elements;     // consecutive elements of a row that share one block; 1 for floats
  int block_bytes;        // bytes of one block in the file
};

// Static facts about a type.
const WeightTypeInfo& InfoOf(WeightType type);

// Bytes of one row of `cols` elements; `cols` must be a multiple of block_elements.
int64_t RowBytes(WeightType type, int64_t cols);

// A matrix as the file stores it: row-major, blocks along the columns.
struct RawWeight {
  const std::byte* data = nullptr;  // host, [rows, RowBytes(type, cols)]
  WeightType type = WeightType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Dequantises row `row` of `weight` to fp32: the reference that every kernel is tested against.
// `out` is [cols], host.
void DequantizeRow(const RawWeight& weight, int64_t row, float* out);

// A weight matrix in a backend's own layout; made by Ops::LoadWeight, used by Ops::Gemm and
// Ops::Embed of the same backend.
class Weight {
 public:
  virtual ~Weight() = default;
  virtual WeightType type() const = 0;
  virtual int64_t rows() const = 0;   // output features (or vocabulary)
  virtual int64_t cols() const = 0;   // input features
  virtual int64_t bytes() const = 0;  // memory that this object owns
};

}  // namespace gloam
