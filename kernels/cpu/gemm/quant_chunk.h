// Some columns of a panel, unpacked. They are taken in chunks that stay in the L1 cache while all
// rows of activations pass over them: beside int8 activations up to 24 runs (12 KiB), so that 768
// columns are one chunk, beside fp32 ones a super-block (16 KiB).
#pragma once

#include <cstdint>

#include "kernels/cpu/gemm/packed_weight.h"

namespace gloam::cpu {

inline constexpr int kMaxChunkRuns = 24;
inline constexpr int kChunkRunsF32 = kRunsPerSuperBlock;
inline constexpr int kChunkColsF32 = kChunkRunsF32 * kRunElements;
inline constexpr int kQuadsPerRun = kRunElements / 4;
inline constexpr int kRunQuantBytes = kPanelRows * kRunElements;

// Part of a quantised panel as bytes and fp32 scales.
struct QuantChunk {
  alignas(64) uint8_t storage[kMaxChunkRuns * kRunQuantBytes];
  alignas(64) float scales[kMaxChunkRuns][2][kPanelRows];
  alignas(64) float mins[kMaxChunkRuns][kPanelRows];
  const uint8_t* quants = nullptr;  // [num_runs][8 quads][16 rows][4 columns]
  int num_runs = 0;
};

}  // namespace gloam::cpu
