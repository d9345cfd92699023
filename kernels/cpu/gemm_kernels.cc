#include "kernels/cpu/gemm_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "hwy/cache_control.h"

// Scalable vectors cannot be array elements, which the register tiles need.
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm_kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

#if defined(__clang__)
#define GLOAM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GLOAM_UNROLL _Pragma("GCC unroll 16")
#endif

#ifndef GLOAM_GEMM_KERNELS_ONCE
#define GLOAM_GEMM_KERNELS_ONCE
namespace gloam::cpu {

// Columns are taken in chunks of one super-block, unpacked to a buffer that stays in the L1 cache
// while all rows of activations pass over it.
constexpr int kChunkRuns = kRunsPerSuperBlock;
constexpr int kChunkCols = kChunkRuns * kRunElements;
constexpr int kQuadsPerRun = kRunElements / 4;
constexpr int kRunQuantBytes = kPanelRows * kRunElements;

// Part of a quantised panel, unpacked to bytes and fp32 scales.
struct QuantChunk {
  alignas(64) uint8_t storage[kChunkRuns * kRunQuantBytes];
  alignas(64) float scales[kChunkRuns][2][kPanelRows];
  alignas(64) float mins[kChunkRuns][kPanelRows];
  const uint8_t* quants = nullptr;  // [num_runs][8 quads][16 rows][4 columns]
  int num_runs = 0;
};

inline std::atomic<bool> vnni_disabled{false};

}  // namespace gloam::cpu
#endif  // GLOAM_GEMM_KERNELS_ONCE

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// A vector holds kLanes of the panel's 16 rows; wider panels are done in kLanes-wide strips.
using DF = hn::CappedTag<float, kPanelRows>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using VU = hn::Vec<DU>;
constexpr DF df;
constexpr DI di;
constexpr DU du;
constexpr int kLanes = hn::MaxLanes(df);

// Rows of activations per register tile: two accumulators each, of 32 or 16 vector registers.
constexpr int kTileRows = HWY_TARGET == HWY_AVX3 ? 8 : 4;

// ---- Unpacking -------------------------------------------------------------------------------

// Lanes of 16 fp16 values as fp32.
VF LoadF16(const std::byte* p) {
  const hn::Rebind<uint16_t, DF> du16;
  const hn::Rebind<hwy::float16_t, DF> df16;
  return hn::PromoteTo(df,
                       hn::BitCast(df16, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p))));
}

template <typename Byte>
VF LoadBytes(const std::byte* p) {
  const hn::Rebind<Byte, DF> d8;
  return hn::ConvertTo(df, hn::PromoteTo(di, hn::LoadU(d8, reinterpret_cast<const Byte*>(p))));
}

template <int kBits>
void UnpackRun(const std::byte* packed, uint8_t* out) {
  const auto* in = reinterpret_cast<const uint32_t*>(packed);
  auto* quads = reinterpret_cast<uint32_t*>(out);
  const VU low_nibbles = hn::Set(du, 0x0f0f0f0f);
  for (int lane = 0; lane < kPanelRows; lane += kLanes) {
    VU quad[kQuadsPerRun];
    GLOAM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const VU word = hn::Load(du, in + j * kPanelRows + lane);
      quad[j] = hn::And(word, low_nibbles);
      quad[j + 4] = hn::And(hn::ShiftRight<4>(word), low_nibbles);
    }
    if constexpr (kBits == 5) {
      VU high = hn::Load(du, in + 4 * kPanelRows + lane);
      GLOAM_UNROLL
      for (int j = 0; j < kQuadsPerRun; ++j, high = hn::ShiftRight<1>(high)) {
        const VU bit = hn::And(high, hn::Set(du, 0x01010101));
        quad[j] = hn::Or(quad[j], hn::ShiftLeft<4>(bit));
      }
    }
    if constexpr (kBits == 6) {
      GLOAM_UNROLL
      for (int c = 0; c < 2; ++c) {
        VU high = hn::Load(du, in + (4 + c) * kPanelRows + lane);
        GLOAM_UNROLL
        for (int i = 0; i < 4; ++i, high = hn::ShiftRight<2>(high)) {
          const VU pair = hn::And(high, hn::Set(du, 0x03030303));
          quad[4 * c + i] = hn::Or(quad[4 * c + i], hn::ShiftLeft<4>(pair));
        }
      }
    }
    GLOAM_UNROLL
    for (int j = 0; j < kQuadsPerRun; ++j) hn::Store(quad[j], du, quads + j * kPanelRows + lane);
  }
}

template <int kBits>
void UnpackRuns(const std::byte* packed, int num_runs, uint8_t* out) {
  for (int run = 0; run < num_runs; ++run) {
    UnpackRun<kBits>(packed + run * kBits * kPanelRows * 4, out + run * kRunQuantBytes);
  }
}

// Scales and mins of a chunk, as fp32; the products with sub-scales are exact.
void ExpandScales(const QuantTraits& traits, const std::byte* in, QuantChunk& chunk) {
  const int min_bytes = traits.has_min ? 2 * kPanelRows : 0;
  for (int lane = 0; lane < kPanelRows; lane += kLanes) {
    if (!traits.is_k_quant) {
      const std::byte* p = in + 2 * lane;
      for (int run = 0; run < chunk.num_runs; ++run, p += 2 * kPanelRows + min_bytes) {
        hn::Store(LoadF16(p), df, chunk.scales[run][0] + lane);
        if (traits.has_min) hn::Store(LoadF16(p + 2 * kPanelRows), df, chunk.mins[run] + lane);
      }
      continue;
    }
    const VF scale = LoadF16(in + 2 * lane);
    const VF min = hn::Neg(traits.has_min ? LoadF16(in + 2 * (kPanelRows + lane)) : hn::Zero(df));
    const std::byte* p = in + 2 * kPanelRows + min_bytes + lane;
    for (int run = 0; run < chunk.num_runs; ++run) {
      for (int i = 0; i < traits.scales_per_run; ++i, p += kPanelRows) {
        hn::Store(hn::Mul(scale, LoadBytes<int8_t>(p)), df, chunk.scales[run][i] + lane);
      }
      if (traits.has_min) {
        hn::Store(hn::Mul(min, LoadBytes<uint8_t>(p)), df, chunk.mins[run] + lane);
        p += kPanelRows;
      }
    }
  }
}

// Fetches what lies kPrefetchBytes past [data, data + bytes): the hardware's prefetchers stop at
// page ends. May run past the weight's end, which a prefetch forgives.
void Prefetch(const std::byte* data, int64_t bytes) {
  constexpr int64_t kPrefetchBytes = 4096;
  for (int64_t i = 0; i < bytes; i += 64) hwy::Prefetch(data + kPrefetchBytes + i);
}

// Unpacks the chunk that begins at run `first_run` of a panel.
void LoadChunk(const PackedWeight& weight, const QuantTraits& traits, int64_t panel,
               int64_t first_run, QuantChunk& chunk) {
  const PanelLayout& layout = weight.layout();
  const std::byte* data = weight.Panel(panel);
  const std::byte* quants = data + first_run * layout.run_quant_bytes;
  chunk.num_runs = static_cast<int>(std::min<int64_t>(kChunkRuns, weight.num_runs() - first_run));
  chunk.quants = chunk.storage;
  switch (traits.bits) {
    case 4:
      UnpackRuns<4>(quants, chunk.num_runs, chunk.storage);
      break;
    case 5:
      UnpackRuns<5>(quants, chunk.num_runs, chunk.storage);
      break;
    case 6:
      UnpackRuns<6>(quants, chunk.num_runs, chunk.storage);
      break;
    default:
      chunk.quants = reinterpret_cast<const uint8_t*>(quants);
      break;
  }
  const int64_t scale_block = traits.is_k_quant ? first_run / kRunsPerSuperBlock : first_run;
  const std::byte* scales = data + layout.scale_offset + scale_block * layout.scale_bytes;
  Prefetch(quants, kChunkRuns * layout.run_quant_bytes);
  Prefetch(scales, layout.scale_bytes * (traits.is_k_quant ? 1 : kChunkRuns));
  ExpandScales(traits, scales, chunk);
}

// A chunk of a panel as fp32: out is [columns of the chunk][16].
void DequantizeChunk(const QuantTraits& traits, const QuantChunk& chunk, float* out) {
  for (int lane = 0; lane < kPanelRows; lane += kLanes) {
    for (int run = 0; run < chunk.num_runs; ++run) {
      const VF min = traits.has_min ? hn::Load(df, chunk.mins[run] + lane) : hn::Zero(df);
      for (int j = 0; j < kQuadsPerRun; ++j) {
        const int group = j * traits.scales_per_run / kQuadsPerRun;
        const VF scale = hn::Load(df, chunk.scales[run][group] + lane);
        VU quad = hn::Load(du, reinterpret_cast<const uint32_t*>(chunk.quants) +
                                   (run * kQuadsPerRun + j) * kPanelRows + lane);
        for (int i = 0; i < 4; ++i, quad = hn::ShiftRight<8>(quad)) {
          const VI quant = hn::BitCast(di, hn::And(quad, hn::Set(du, 0xff)));
          const VF value = hn::ConvertTo(df, hn::Sub(quant, hn::Set(di, traits.offset)));
          // The product is exact, so that this equals DequantizeRow with or without FMA.
          hn::Store(hn::MulAdd(scale, value, min), df,
                    out + (run * kRunElements + 4 * j + i) * kPanelRows + lane);
        }
      }
    }
  }
}

// Columns [col, col + num_cols) of a panel of any type as fp32: out is [num_cols][16].
void LoadChunkF32(const PackedWeight& weight, int64_t panel, int64_t col, int num_cols,
                  float* out) {
  const std::byte* data = weight.Panel(panel);
  switch (weight.type()) {
    case WeightType::kF32:
      std::memcpy(out, data + col * kPanelRows * 4, num_cols * kPanelRows * sizeof(float));
      return;
    case WeightType::kF16:
      for (int i = 0; i < num_cols * kPanelRows; i += kLanes) {
        hn::Store(LoadF16(data + (col * kPanelRows + i) * 2), df, out + i);
      }
      return;
    case WeightType::kBF16: {
      const hn::Rebind<uint16_t, DF> du16;
      const auto* in = reinterpret_cast<const uint16_t*>(data) + col * kPanelRows;
      for (int i = 0; i < num_cols * kPanelRows; i += kLanes) {
        const VU wide = hn::PromoteTo(du, hn::LoadU(du16, in + i));
        hn::Store(hn::BitCast(df, hn::ShiftLeft<16>(wide)), df, out + i);
      }
      return;
    }
    default: {
      const QuantTraits& traits = QuantTraitsOf(weight.type());
      QuantChunk chunk;
      LoadChunk(weight, traits, panel, col / kRunElements, chunk);
      DequantizeChunk(traits, chunk, out);
    }
  }
}

// ---- Dot products of four unsigned weights and four signed activations per lane, exact in int32

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || !HWY_ARCH_X86

// Portable: the products of bytes fit int16, their sums are taken in int32.
template <bool kEightBits>
struct Dot {
  using Weights = VI;
  static Weights Prepare(VU quads) { return hn::BitCast(di, quads); }
  static VI MulAdd(VI sum, Weights w, const int8_t* activations) {
    GLOAM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VI byte = hn::And(w, hn::Set(di, 0xff));
      sum = hn::Add(sum, hn::Mul(byte, hn::Set(di, activations[i])));
      w = hn::ShiftRight<8>(w);
    }
    return sum;
  }
};

#else

#if HWY_TARGET == HWY_AVX3
inline __m512i MulPairs(__m512i w, __m512i a) { return _mm512_maddubs_epi16(w, a); }
inline __m512i AddPairs(__m512i p, __m512i f) { return _mm512_madd_epi16(p, f); }
#elif HWY_TARGET == HWY_AVX2
inline __m256i MulPairs(__m256i w, __m256i a) { return _mm256_maddubs_epi16(w, a); }
inline __m256i AddPairs(__m256i p, __m256i f) { return _mm256_madd_epi16(p, f); }
#else
inline __m128i MulPairs(__m128i w, __m128i a) { return _mm_maddubs_epi16(w, a); }
inline __m128i AddPairs(__m128i p, __m128i f) { return _mm_madd_epi16(p, f); }
#endif

inline VI BroadcastFour(const int8_t* activations) {
  int32_t four;
  std::memcpy(&four, activations, sizeof(four));
  return hn::Set(di, four);
}

// maddubs adds two products in saturating int16: 2 * 127 * 127 fits, so eight-bit weights are
// split into their low seven bits and the top one.
template <bool kEightBits>
struct Dot {
  struct Weights {
    VI low;
    VI top;  // only with kEightBits
  };
  static Weights Prepare(VU quads) {
    if constexpr (!kEightBits) return {hn::BitCast(di, quads), hn::Zero(di)};
    return {hn::BitCast(di, hn::And(quads, hn::Set(du, 0x7f7f7f7f))),
            hn::BitCast(di, hn::And(hn::ShiftRight<7>(quads), hn::Set(du, 0x01010101)))};
  }
  static VI MulAdd(VI sum, const Weights& w, const int8_t* activations) {
    const VI a = BroadcastFour(activations);
    const VI ones = hn::Set(di, 0x00010001);
    sum = hn::Add(sum, VI{AddPairs(MulPairs(w.low.raw, a.raw), ones.raw)});
    if constexpr (kEightBits) {
      const VI factor = hn::Set(di, 0x00800080);
      sum = hn::Add(sum, VI{AddPairs(MulPairs(w.top.raw, a.raw), factor.raw)});
    }
    return sum;
  }
};

#endif

#if HWY_TARGET == HWY_AVX3
// As an asm statement because Highway 1.0.3 has no target with AVX512-VNNI but without AVX-VNNI,
// which the compiler could then use on hosts that lack it.
struct DotVnni {
  using Weights = VU;
  static Weights Prepare(VU quads) { return quads; }
  static VI MulAdd(VI sum, Weights w, const int8_t* activations) {
    const auto* four = reinterpret_cast<const int32_t*>(activations);
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(w.raw), "m"(*four));
    return sum;
  }
};

bool UseVnni() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni && !vnni_disabled.load(std::memory_order_relaxed);
}
#endif

// ---- Tiles -----------------------------------------------------------------------------------

// kRows rows of activations times a strip of a panel, over one chunk of columns.
template <typename DotT, bool kHasMin, int kGroups>
struct Int8Tile {
  const QuantChunk* chunk;
  QuantizedRows x;    // first row of the call
  int64_t first_run;  // of the chunk
  int offset;         // of the weight's quants
  int lane;           // of the strip
  float* sums;        // [num_rows][16]

  template <int kRows>
  void Run(int first_row) const {
    constexpr int kGroupQuads = kQuadsPerRun / kGroups;
    const QuantizedRows rows = x.Skip(first_row);
    const int64_t num_blocks = x.cols / kRunElements;
    VF sum[kRows];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = hn::Load(df, sums + (first_row + r) * kPanelRows + lane);
    }
    for (int run = 0; run < chunk->num_runs; ++run) {
      const int8_t* quants = rows.quants + (first_run + run) * kRunElements;
      const ActivationBlock* blocks = rows.blocks + first_run + run;
      const auto* weights =
          reinterpret_cast<const uint32_t*>(chunk->quants + run * kRunQuantBytes) + lane;
      GLOAM_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        VI dot[kRows];
        GLOAM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int32_t* half_sums = blocks[r * num_blocks].half_sums;
          const int32_t quant_sum = kGroups == 1 ? half_sums[0] + half_sums[1] : half_sums[group];
          dot[r] = kHasMin ? hn::Zero(di) : hn::Set(di, -offset * quant_sum);
        }
        GLOAM_UNROLL
        for (int j = group * kGroupQuads; j < (group + 1) * kGroupQuads; ++j) {
          const auto w = DotT::Prepare(hn::Load(du, weights + j * kPanelRows));
          GLOAM_UNROLL
          for (int r = 0; r < kRows; ++r) {
            dot[r] = DotT::MulAdd(dot[r], w, quants + r * x.cols + j * 4);
          }
        }
        const VF scale = hn::Load(df, chunk->scales[run][group] + lane);
        GLOAM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const VF both = hn::Mul(scale, hn::Set(df, blocks[r * num_blocks].scale));
          sum[r] = hn::MulAdd(hn::ConvertTo(df, dot[r]), both, sum[r]);
        }
      }
      if constexpr (kHasMin) {
        const VF min = hn::Load(df, chunk->mins[run] + lane);
        GLOAM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sum[r] = hn::MulAdd(min, hn::Set(df, blocks[r * num_blocks].scaled_sum), sum[r]);
        }
      }
    }
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      hn::Store(sum[r], df, sums + (first_row + r) * kPanelRows + lane);
    }
  }
};

struct F32Tile {
  const float* weights;  // [num_cols][16]
  int num_cols;
  const float* x;  // first row of the call, first column of the chunk
  int64_t x_stride;
  int lane;
  float* sums;  // [num_rows][16]

  template <int kRows>
  void Run(int first_row) const {
    const float* rows = x + first_row * x_stride;
    VF sum[kRows];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = hn::Load(df, sums + (first_row + r) * kPanelRows + lane);
    }
    for (int k = 0; k < num_cols; ++k) {
      const VF w = hn::Load(df, weights + k * kPanelRows + lane);
      GLOAM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] = hn::MulAdd(w, hn::Set(df, rows[r * x_stride + k]), sum[r]);
      }
    }
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      hn::Store(sum[r], df, sums + (first_row + r) * kPanelRows + lane);
    }
  }
};

// Covers rows [row, num_rows) with tiles of kRows, the rest with smaller ones.
template <int kRows, typename Tile>
void RunTiles(const Tile& tile, int row, int num_rows) {
  for (; row + kRows <= num_rows; row += kRows) tile.template Run<kRows>(row);
  if constexpr (kRows > 1) RunTiles<kRows / 2>(tile, row, num_rows);
}

// sums: [num_rows][16], complete.
void StoreSums(const float* sums, int num_rows, const PanelOutput& out) {
  for (int row = 0; row < num_rows; ++row, sums += kPanelRows) {
    float* y = out.y + row * out.row_stride;
    if (out.num_cols == kPanelRows) {
      for (int lane = 0; lane < kPanelRows; lane += kLanes) {
        VF value = hn::Load(df, sums + lane);
        if (out.bias != nullptr) value = hn::Add(value, hn::LoadU(df, out.bias + lane));
        if (out.accumulate) value = hn::Add(hn::LoadU(df, y + lane), value);
        hn::StoreU(value, df, y + lane);
      }
      continue;
    }
    for (int col = 0; col < out.num_cols; ++col) {
      float value = sums[col];
      if (out.bias != nullptr) value += out.bias[col];
      y[col] = out.accumulate ? y[col] + value : value;
    }
  }
}

template <typename DotT, bool kHasMin, int kGroups>
void MultiplyPanel(const PackedWeight& weight, const QuantTraits& traits, int64_t panel,
                   const QuantizedRows& x, int num_rows, const PanelOutput& out) {
  alignas(64) float sums[kMaxRowsPerCall * kPanelRows];
  std::memset(sums, 0, num_rows * kPanelRows * sizeof(float));
  QuantChunk chunk;
  for (int64_t run = 0; run < weight.num_runs(); run += kChunkRuns) {
    LoadChunk(weight, traits, panel, run, chunk);
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      const Int8Tile<DotT, kHasMin, kGroups> tile = {&chunk, x, run, traits.offset, lane, sums};
      RunTiles<kTileRows>(tile, 0, num_rows);
    }
  }
  StoreSums(sums, num_rows, out);
}

// DotT<8 bits?> for the weight's kind.
template <typename Dot8, typename DotLess>
void MultiplyAnyPanel(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                      int num_rows, const PanelOutput& out) {
  const QuantTraits& traits = QuantTraitsOf(weight.type());
  if (traits.has_min) {
    MultiplyPanel<DotLess, true, 1>(weight, traits, panel, x, num_rows, out);
  } else if (traits.scales_per_run == 2) {
    MultiplyPanel<DotLess, false, 2>(weight, traits, panel, x, num_rows, out);
  } else if (traits.bits == 8) {
    MultiplyPanel<Dot8, false, 1>(weight, traits, panel, x, num_rows, out);
  } else {
    MultiplyPanel<DotLess, false, 1>(weight, traits, panel, x, num_rows, out);
  }
}

void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PanelOutput& out) {
#if HWY_TARGET == HWY_AVX3
  if (UseVnni()) {
    MultiplyAnyPanel<DotVnni, DotVnni>(weight, panel, x, num_rows, out);
    return;
  }
#endif
  MultiplyAnyPanel<Dot<true>, Dot<false>>(weight, panel, x, num_rows, out);
}

void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out) {
  alignas(64) float sums[kMaxRowsPerCall * kPanelRows];
  alignas(64) float weights[kChunkCols * kPanelRows];
  std::memset(sums, 0, num_rows * kPanelRows * sizeof(float));
  for (int64_t col = 0; col < weight.cols(); col += kChunkCols) {
    const int num_cols = static_cast<int>(std::min<int64_t>(kChunkCols, weight.cols() - col));
    LoadChunkF32(weight, panel, col, num_cols, weights);
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      const F32Tile tile = {weights, num_cols, x + col, x_stride, lane, sums};
      RunTiles<kTileRows>(tile, 0, num_rows);
    }
  }
  StoreSums(sums, num_rows, out);
}

void UnpackRow(const PackedWeight& weight, int64_t row, float* out) {
  alignas(64) float chunk[kChunkCols * kPanelRows];
  const int64_t panel = row / kPanelRows;
  const int64_t lane = row % kPanelRows;
  for (int64_t col = 0; col < weight.cols(); col += kChunkCols) {
    const int num_cols = static_cast<int>(std::min<int64_t>(kChunkCols, weight.cols() - col));
    LoadChunkF32(weight, panel, col, num_cols, chunk);
    for (int i = 0; i < num_cols; ++i) out[col + i] = chunk[i * kPanelRows + lane];
  }
}

// ---- Quantisation of activations -------------------------------------------------------------

void QuantizeRow(const float* x, int64_t cols, int8_t* quants, ActivationBlock* blocks) {
  for (int64_t col = 0; col < cols; col += kRunElements, ++blocks) {
    VF max = hn::Zero(df);
    for (int i = 0; i < kRunElements; i += kLanes) {
      max = hn::Max(max, hn::Abs(hn::LoadU(df, x + col + i)));
    }
    const float largest = hn::GetLane(hn::MaxOfLanes(df, max));
    // Blocks so small that 127 / largest would overflow count as zero.
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    VI half_sums[2] = {hn::Zero(di), hn::Zero(di)};
    for (int i = 0; i < kRunElements; i += kLanes) {
      const VF scaled = hn::Mul(hn::LoadU(df, x + col + i), hn::Set(df, inverse));
      const VI quant = hn::NearestInt(scaled);
      VI& half_sum = half_sums[i / (kRunElements / 2)];
      half_sum = hn::Add(half_sum, quant);
      const hn::Rebind<int8_t, DF> d8;
      hn::StoreU(hn::DemoteTo(d8, quant), d8, quants + col + i);
    }
    blocks->scale = largest / 127.0f;
    blocks->half_sums[0] = hn::GetLane(hn::SumOfLanes(di, half_sums[0]));
    blocks->half_sums[1] = hn::GetLane(hn::SumOfLanes(di, half_sums[1]));
    blocks->scaled_sum =
        blocks->scale * static_cast<float>(blocks->half_sums[0] + blocks->half_sums[1]);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(QuantizeRow);
HWY_EXPORT(MultiplyPanelInt8);
HWY_EXPORT(MultiplyPanelF32);
HWY_EXPORT(UnpackRow);

void QuantizeRow(const float* x, int64_t cols, int8_t* quants, ActivationBlock* blocks) {
  HWY_DYNAMIC_DISPATCH(QuantizeRow)(x, cols, quants, blocks);
}

void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PanelOutput& out) {
  GLOAM_CHECK(num_rows <= kMaxRowsPerCall);
  HWY_DYNAMIC_DISPATCH(MultiplyPanelInt8)(weight, panel, x, num_rows, out);
}

void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out) {
  GLOAM_CHECK(num_rows <= kMaxRowsPerCall);
  HWY_DYNAMIC_DISPATCH(MultiplyPanelF32)(weight, panel, x, x_stride, num_rows, out);
}

void UnpackRow(const PackedWeight& weight, int64_t row, float* out) {
  HWY_DYNAMIC_DISPATCH(UnpackRow)(weight, row, out);
}

void DisableVnniForTest(bool disable) { vnni_disabled.store(disable); }

}  // namespace gloam::cpu
#endif  // HWY_ONCE
