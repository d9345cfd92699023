// A weight matrix as the CPU backend keeps it: panels of 16 output rows, interleaved along the
// columns so that one 64-byte vector holds four neighbouring columns of all 16 rows. Made by
// PackWeight, immutable afterwards.
//
// A panel of a quantised type is its quants, run after run of 32 columns, then its scales.
//   Quants of a run, in units of 16 rows x 4 columns x 1 byte ("quads", j = 0..7 along the
//   columns):
//     4 bits: 4 x 64 bytes; low nibbles are quads 0..3, high nibbles quads 4..7.
//     5 bits: and 64 bytes whose bit j is the fifth bit of quad j.
//     6 bits: and 2 x 64 bytes whose bits 2i, 2i+1 are the high bits of quad i (4 + i).
//     8 bits: 8 x 64 bytes.
//   Scales of a run: fp16 scale[16], and fp16 min[16] where the type has one.
//   K-quants, per super-block of 8 runs: those, then for each run int8 sub_scale[16] (Q6_K: twice,
//   one per 16 columns) and uint8 sub_min[16] where the type has one.
// A panel of a float type is [cols][16] elements. Rows past the end are zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/ops.h"
#include "kernels/quant_block.h"
#include "kernels/weight.h"

namespace gloam::cpu {

inline constexpr int kPanelRows = 16;
inline constexpr int kRunsPerSuperBlock = 8;

// Sizes of the layout above; a pure function of type and columns.
struct PanelLayout {
  int64_t run_quant_bytes = 0;  // 0 for float types
  int64_t scale_offset = 0;     // of the scales in a panel
  int64_t scale_bytes = 0;      // of one run, or of one super-block of a K-quant
  int64_t panel_bytes = 0;      // multiple of 64
};
PanelLayout PanelLayoutOf(WeightType type, int64_t cols);

// Some bytes of a packed weight.
struct PackedBytes {
  const std::byte* data = nullptr;
  int64_t count = 0;
};

class PackedWeight final : public Weight {
 public:
  PackedWeight(WeightType type, int64_t rows, int64_t cols, Buffer buffer)
      : type_(type),
        rows_(rows),
        cols_(cols),
        layout_(PanelLayoutOf(type, cols)),
        buffer_(std::move(buffer)) {}

  WeightType type() const override { return type_; }
  int64_t rows() const override { return rows_; }
  int64_t cols() const override { return cols_; }
  int64_t bytes() const override { return static_cast<int64_t>(buffer_.bytes()); }

  const PanelLayout& layout() const { return layout_; }
  int64_t num_panels() const { return (rows_ + kPanelRows - 1) / kPanelRows; }
  int64_t num_runs() const { return cols_ / kRunElements; }
  const std::byte* Panel(int64_t panel) const {
    return static_cast<const std::byte*>(buffer_.data()) + panel * layout_.panel_bytes;
  }
  PackedBytes PanelBytes(int64_t panel) const { return {Panel(panel), layout_.panel_bytes}; }

 private:
  WeightType type_;
  int64_t rows_;
  int64_t cols_;
  PanelLayout layout_;
  Buffer buffer_;
};

}  // namespace gloam::cpu
