// Repacks weights of a model file into panels (packed_weight.h). Runs once per weight at load.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/gemm/packed_weight.h"
#include "kernels/cpu/memory.h"

namespace gloam::cpu {
namespace {

constexpr int64_t kQuadBytes = int64_t{kPanelRows} * 4;

void StoreWord(std::byte* base, int64_t quad, int lane, uint32_t word) {
  std::memcpy(base + quad * kQuadBytes + lane * 4, &word, sizeof(word));
}

// Writes one row's run into its lane of the panel's run at `out`.
void PackQuants(int bits, const QuantRun& run, int lane, std::byte* out) {
  const std::array<uint32_t, 8>& quants = run.quants;
  if (bits == 8) {
    for (int j = 0; j < 8; ++j) StoreWord(out, j, lane, quants[j]);
    return;
  }
  constexpr uint32_t kLowNibbles = 0x0f0f0f0f;
  for (int j = 0; j < 4; ++j) {
    StoreWord(out, j, lane, (quants[j] & kLowNibbles) | (quants[j + 4] & kLowNibbles) << 4);
  }
  if (bits == 5) {
    uint32_t high = 0;
    for (int j = 0; j < 8; ++j) high |= ((quants[j] >> 4) & 0x01010101) << j;
    StoreWord(out, 4, lane, high);
  }
  if (bits == 6) {
    for (int c = 0; c < 2; ++c) {
      uint32_t high = 0;
      for (int i = 0; i < 4; ++i) high |= ((quants[4 * c + i] >> 4) & 0x03030303) << (2 * i);
      StoreWord(out, 4 + c, lane, high);
    }
  }
}

// `scales` are the panel's.
void PackScales(const QuantTraits& traits, const PanelLayout& layout, const QuantRun& run,
                int64_t run_index, int lane, std::byte* scales) {
  const int64_t block = traits.is_k_quant ? run_index / kRunsPerSuperBlock : run_index;
  std::byte* out = scales + block * layout.scale_bytes;
  std::memcpy(out + 2 * lane, &run.scale, 2);
  out += 2 * kPanelRows;
  if (traits.has_min) {
    std::memcpy(out + 2 * lane, &run.min, 2);
    out += 2 * kPanelRows;
  }
  if (!traits.is_k_quant) return;
  const int bytes_per_run = (traits.scales_per_run + (traits.has_min ? 1 : 0)) * kPanelRows;
  out += run_index % kRunsPerSuperBlock * bytes_per_run + lane;
  for (int i = 0; i < traits.scales_per_run; ++i, out += kPanelRows) {
    *out = static_cast<std::byte>(run.sub_scales[i]);
  }
  if (traits.has_min) *out = static_cast<std::byte>(run.sub_min);
}

// The panel's source rows; null past the end of the weight.
using PanelSource = std::array<const std::byte*, kPanelRows>;

void PackQuantizedPanel(WeightType type, int64_t num_runs, const PanelLayout& layout,
                        const PanelSource& rows, std::byte* panel) {
  const QuantTraits traits = QuantTraitsOf(type);
  for (int64_t run_index = 0; run_index < num_runs; ++run_index) {
    std::byte* quants = panel + run_index * layout.run_quant_bytes;
    for (int lane = 0; lane < kPanelRows && rows[lane] != nullptr; ++lane) {
      const QuantRun run = DecodeRun(type, rows[lane], run_index);
      PackQuants(traits.bits, run, lane, quants);
      PackScales(traits, layout, run, run_index, lane, panel + layout.scale_offset);
    }
  }
}

template <typename Element>
void PackFloatPanel(int64_t cols, const PanelSource& rows, std::byte* panel) {
  for (int lane = 0; lane < kPanelRows && rows[lane] != nullptr; ++lane) {
    for (int64_t k = 0; k < cols; ++k) {
      std::memcpy(panel + (k * kPanelRows + lane) * sizeof(Element),
                  rows[lane] + k * sizeof(Element), sizeof(Element));
    }
  }
}

}  // namespace

PanelLayout PanelLayoutOf(WeightType type, int64_t cols) {
  PanelLayout layout;
  if (!IsQuantized(type)) {
    layout.panel_bytes = RowBytes(type, cols) * kPanelRows;
  } else {
    const QuantTraits traits = QuantTraitsOf(type);
    const int64_t num_runs = cols / kRunElements;
    const int num_mins = traits.has_min ? 1 : 0;
    layout.run_quant_bytes = kQuadBytes * traits.bits;
    layout.scale_offset = num_runs * layout.run_quant_bytes;
    layout.scale_bytes = (1 + num_mins) * 2 * kPanelRows;
    int64_t num_scale_blocks = num_runs;
    if (traits.is_k_quant) {
      layout.scale_bytes += kRunsPerSuperBlock * (traits.scales_per_run + num_mins) * kPanelRows;
      num_scale_blocks /= kRunsPerSuperBlock;
    }
    layout.panel_bytes = layout.scale_offset + num_scale_blocks * layout.scale_bytes;
  }
  layout.panel_bytes = (layout.panel_bytes + 63) / 64 * 64;
  return layout;
}

StatusOr<std::unique_ptr<Weight>> PackWeight(std::span<const RawWeight> parts, ThreadPool& pool) {
  GLOAM_CHECK(!parts.empty());
  const WeightType type = parts[0].type;
  const int64_t cols = parts[0].cols;
  const int64_t row_bytes = RowBytes(type, cols);
  std::vector<const std::byte*> rows;
  for (const RawWeight& part : parts) {
    GLOAM_CHECK(part.type == type && part.cols == cols && part.rows >= 0);
    for (int64_t row = 0; row < part.rows; ++row) rows.push_back(part.data + row * row_bytes);
  }
  const PanelLayout layout = PanelLayoutOf(type, cols);
  const auto num_rows = static_cast<int64_t>(rows.size());
  const int64_t num_panels = (num_rows + kPanelRows - 1) / kPanelRows;
  GLOAM_ASSIGN_OR_RETURN(Buffer buffer, AllocateBuffer(num_panels * layout.panel_bytes));
  auto* const data = static_cast<std::byte*>(buffer.data());

  pool.ParallelFor(num_panels, [&](int64_t panel_index, int) {
    PanelSource source = {};
    const int64_t begin = panel_index * kPanelRows;
    std::copy_n(rows.begin() + begin, std::min<int64_t>(kPanelRows, num_rows - begin),
                source.begin());
    std::byte* panel = data + panel_index * layout.panel_bytes;
    if (IsQuantized(type)) {
      PackQuantizedPanel(type, cols / kRunElements, layout, source, panel);
    } else if (type == WeightType::kF32) {
      PackFloatPanel<uint32_t>(cols, source, panel);
    } else {
      PackFloatPanel<uint16_t>(cols, source, panel);
    }
  });
  return std::make_unique<PackedWeight>(type, num_rows, cols, std::move(buffer));
}

}  // namespace gloam::cpu
