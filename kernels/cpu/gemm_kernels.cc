#include "kernels/cpu/gemm_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "base/check.h"
#include "kernels/cpu/prefetch.h"

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

// A quantised type as template arguments; QuantTraits says what they mean.
template <int kBits_, int kLogOffset_, bool kHasMin_, bool kIsKQuant_, int kGroups_>
struct Format {
  static constexpr int kBits = kBits_;
  static constexpr int kLogOffset = kLogOffset_;  // of types without a min
  static constexpr bool kHasMin = kHasMin_;
  static constexpr bool kIsKQuant = kIsKQuant_;
  static constexpr int kGroups = kGroups_;  // scales per run
  static constexpr int kRunBytes = kBits * kPanelRows * 4;
  static constexpr int kNumMins = kHasMin ? 1 : 0;
  static constexpr int kBlockScaleBytes = (1 + kNumMins) * 2 * kPanelRows;
  static constexpr int kSubScaleBytes = (kGroups + kNumMins) * kPanelRows;  // of a run
};

// Calls call.Run<Format>() with the format of a quantised type.
template <typename Call>
void WithFormat(WeightType type, const Call& call) {
  switch (type) {
    case WeightType::kQ4_0:
      return call.template Run<Format<4, 3, false, false, 1>>();
    case WeightType::kQ4_1:
      return call.template Run<Format<4, 0, true, false, 1>>();
    case WeightType::kQ5_0:
      return call.template Run<Format<5, 4, false, false, 1>>();
    case WeightType::kQ5_1:
      return call.template Run<Format<5, 0, true, false, 1>>();
    case WeightType::kQ8_0:
      return call.template Run<Format<8, 7, false, false, 1>>();
    case WeightType::kQ4_K:
      return call.template Run<Format<4, 0, true, true, 1>>();
    case WeightType::kQ5_K:
      return call.template Run<Format<5, 0, true, true, 1>>();
    case WeightType::kQ6_K:
      return call.template Run<Format<6, 5, false, true, 2>>();
    default:
      GLOAM_CHECK(!IsQuantized(type));  // the list above is that of IsQuantized
  }
}

// The quads of a packed run, kLanes rows of the panel from `lane` on.
template <int kBits>
HWY_INLINE void UnpackQuads(const std::byte* packed, int lane, VU quad[kQuadsPerRun]) {
  const uint32_t* in = reinterpret_cast<const uint32_t*>(packed) + lane;
  if constexpr (kBits == 8) {
    GLOAM_UNROLL
    for (int j = 0; j < kQuadsPerRun; ++j) quad[j] = hn::Load(du, in + j * kPanelRows);
    return;
  }
  const VU low_nibbles = hn::Set(du, 0x0f0f0f0f);
  GLOAM_UNROLL
  for (int j = 0; j < 4; ++j) {
    const VU word = hn::Load(du, in + j * kPanelRows);
    quad[j] = hn::And(word, low_nibbles);
    quad[j + 4] = hn::And(hn::ShiftRight<4>(word), low_nibbles);
  }
  if constexpr (kBits == 5) {
    VU high = hn::Load(du, in + 4 * kPanelRows);
    GLOAM_UNROLL
    for (int j = 0; j < kQuadsPerRun; ++j, high = hn::ShiftRight<1>(high)) {
      const VU bit = hn::And(high, hn::Set(du, 0x01010101));
      quad[j] = hn::Or(quad[j], hn::ShiftLeft<4>(bit));
    }
  }
  if constexpr (kBits == 6) {
    GLOAM_UNROLL
    for (int c = 0; c < 2; ++c) {
      VU high = hn::Load(du, in + (4 + c) * kPanelRows);
      GLOAM_UNROLL
      for (int i = 0; i < 4; ++i, high = hn::ShiftRight<2>(high)) {
        const VU pair = hn::And(high, hn::Set(du, 0x03030303));
        quad[4 * c + i] = hn::Or(quad[4 * c + i], hn::ShiftLeft<4>(pair));
      }
    }
  }
}

// Scales of a run, one or two per row of the panel, and its mins; the products with sub-scales are
// exact. `scales` are the panel's.
template <typename F>
HWY_INLINE void LoadScales(const std::byte* scales, int64_t run, int lane, VF scale[F::kGroups],
                           VF& min) {
  if constexpr (!F::kIsKQuant) {
    const std::byte* p = scales + run * F::kBlockScaleBytes + 2 * lane;
    scale[0] = LoadF16(p);
    if constexpr (F::kHasMin) min = LoadF16(p + 2 * kPanelRows);
  } else {
    constexpr int kBlockBytes = F::kBlockScaleBytes + kRunsPerSuperBlock * F::kSubScaleBytes;
    const std::byte* block = scales + run / kRunsPerSuperBlock * kBlockBytes;
    const std::byte* sub =
        block + F::kBlockScaleBytes + run % kRunsPerSuperBlock * F::kSubScaleBytes + lane;
    const VF block_scale = LoadF16(block + 2 * lane);
    GLOAM_UNROLL
    for (int i = 0; i < F::kGroups; ++i) {
      scale[i] = hn::Mul(block_scale, LoadBytes<int8_t>(sub + i * kPanelRows));
    }
    if constexpr (F::kHasMin) {
      const VF block_min = hn::Neg(LoadF16(block + 2 * (kPanelRows + lane)));
      min = hn::Mul(block_min, LoadBytes<uint8_t>(sub + F::kGroups * kPanelRows));
    }
  }
}

// Fetches what lies kPrefetchBytes past [data, data + bytes): the hardware's prefetchers stop at
// page ends. May run past the weight's end, which a prefetch forgives.
void Prefetch(const std::byte* data, int64_t bytes) {
  constexpr int64_t kPrefetchBytes = 4096;
  PrefetchRange(data + kPrefetchBytes, bytes);
}

// Unpacks the chunk that begins at run `first_run` of a panel.
template <typename F>
void LoadChunk(const PackedWeight& weight, int64_t panel, int64_t first_run, QuantChunk& chunk) {
  const std::byte* data = weight.Panel(panel);
  const std::byte* quants = data + first_run * F::kRunBytes;
  const std::byte* scales = data + weight.layout().scale_offset;
  chunk.num_runs = static_cast<int>(std::min<int64_t>(kChunkRuns, weight.num_runs() - first_run));
  chunk.quants = F::kBits == 8 ? reinterpret_cast<const uint8_t*>(quants) : chunk.storage;
  Prefetch(quants, kChunkRuns * F::kRunBytes);
  for (int run = 0; run < chunk.num_runs; ++run) {
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      if constexpr (F::kBits != 8) {
        VU quad[kQuadsPerRun];
        UnpackQuads<F::kBits>(quants + run * F::kRunBytes, lane, quad);
        auto* out = reinterpret_cast<uint32_t*>(chunk.storage + run * kRunQuantBytes) + lane;
        GLOAM_UNROLL
        for (int j = 0; j < kQuadsPerRun; ++j) hn::Store(quad[j], du, out + j * kPanelRows);
      }
      VF scale[F::kGroups];
      VF min = hn::Zero(df);
      LoadScales<F>(scales, first_run + run, lane, scale, min);
      GLOAM_UNROLL
      for (int i = 0; i < F::kGroups; ++i) hn::Store(scale[i], df, chunk.scales[run][i] + lane);
      if constexpr (F::kHasMin) hn::Store(min, df, chunk.mins[run] + lane);
    }
  }
}

// Part of a panel as fp32: out is [columns of the chunk][16].
struct DequantizeChunk {
  const PackedWeight& weight;
  int64_t panel;
  int64_t first_run;
  float* out;

  template <typename F>
  void Run() const {
    QuantChunk chunk;
    LoadChunk<F>(weight, panel, first_run, chunk);
    constexpr int kOffset = F::kHasMin ? 0 : 1 << F::kLogOffset;
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      for (int run = 0; run < chunk.num_runs; ++run) {
        const VF min = F::kHasMin ? hn::Load(df, chunk.mins[run] + lane) : hn::Zero(df);
        for (int j = 0; j < kQuadsPerRun; ++j) {
          const int group = j * F::kGroups / kQuadsPerRun;
          const VF scale = hn::Load(df, chunk.scales[run][group] + lane);
          VU quad = hn::Load(du, reinterpret_cast<const uint32_t*>(chunk.quants) +
                                     (run * kQuadsPerRun + j) * kPanelRows + lane);
          for (int i = 0; i < 4; ++i, quad = hn::ShiftRight<8>(quad)) {
            const VI quant = hn::BitCast(di, hn::And(quad, hn::Set(du, 0xff)));
            const VF value = hn::ConvertTo(df, hn::Sub(quant, hn::Set(di, kOffset)));
            // The product is exact, so that this equals DequantizeRow with or without FMA.
            hn::Store(hn::MulAdd(scale, value, min), df,
                      out + (run * kRunElements + 4 * j + i) * kPanelRows + lane);
          }
        }
      }
    }
  }
};

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
    default:
      WithFormat(weight.type(), DequantizeChunk{weight, panel, col / kRunElements, out});
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

// A run of a group of kGroupRows quantised rows, from one of its rows on.
template <int kGroupRows>
struct ActivationRun {
  static constexpr int64_t kBytes = kGroupRows * QuantizedRows::kBytesPerRun;
  const std::byte* group;  // begin of the run
  int row;

  const int8_t* Quants(int r) const {
    return reinterpret_cast<const int8_t*>(group) + (row + r) * kRunElements;
  }
  float Scale(int r) const { return Field<float>(0, r); }
  float ScaledSum(int r) const { return Field<float>(1, r); }
  int32_t NegatedSum(int r) const { return Field<int32_t>(2, r); }
  int32_t NegatedHalfSum(int r) const { return Field<int32_t>(3, r); }

  template <typename T>
  T Field(int field, int r) const {
    T value;
    std::memcpy(&value, group + kGroupRows * (kRunElements + 4 * field) + 4 * (row + r), 4);
    return value;
  }
};

// sum[r] += the products of one run, for kRows rows of activations and a strip of the panel.
// quad(j) is the run's quad j.
template <typename DotT, typename F, int kRows, typename Run, typename QuadOf>
HWY_INLINE void AddRun(const Run& x, const VF scale[F::kGroups], VF min, const QuadOf& quad,
                       VF sum[kRows]) {
  constexpr int kGroupQuads = kQuadsPerRun / F::kGroups;
  GLOAM_UNROLL
  for (int group = 0; group < F::kGroups; ++group) {
    VI dot[kRows];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if constexpr (F::kHasMin) {
        dot[r] = hn::Zero(di);
        continue;
      }
      VI negated_sum = hn::Set(di, F::kGroups == 1 ? x.NegatedSum(r) : x.NegatedHalfSum(r));
      if (group == 1) negated_sum = hn::Sub(hn::Set(di, x.NegatedSum(r)), negated_sum);
      dot[r] = hn::ShiftLeft<F::kLogOffset>(negated_sum);
    }
    GLOAM_UNROLL
    for (int j = group * kGroupQuads; j < (group + 1) * kGroupQuads; ++j) {
      const auto w = DotT::Prepare(quad(j));
      GLOAM_UNROLL
      for (int r = 0; r < kRows; ++r) dot[r] = DotT::MulAdd(dot[r], w, x.Quants(r) + 4 * j);
    }
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VF both = hn::Mul(scale[group], hn::Set(df, x.Scale(r)));
      sum[r] = hn::MulAdd(hn::ConvertTo(df, dot[r]), both, sum[r]);
    }
  }
  if constexpr (F::kHasMin) {
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = hn::MulAdd(min, hn::Set(df, x.ScaledSum(r)), sum[r]);
  }
}

// kRows rows of activations times a strip of a panel, over one unpacked chunk of columns.
template <typename DotT, typename F>
struct ChunkTile {
  const QuantChunk* chunk;
  QuantizedRows x;    // first row of the call, groups of kRowGroup
  int64_t first_run;  // of the chunk
  int lane;           // of the strip
  float* sums;        // [num_rows][16]

  template <int kRows>
  void Run(int first_row) const {
    using XRun = ActivationRun<kRowGroup>;
    const QuantizedRows group = x.Skip(first_row / kRowGroup * kRowGroup);
    XRun x_run = {group.data + first_run * XRun::kBytes, first_row % kRowGroup};
    float* row_sums = sums + first_row * kPanelRows + lane;
    VF sum[kRows];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = hn::Load(df, row_sums + r * kPanelRows);
    for (int run = 0; run < chunk->num_runs; ++run, x_run.group += XRun::kBytes) {
      const auto* quads =
          reinterpret_cast<const uint32_t*>(chunk->quants + run * kRunQuantBytes) + lane;
      VF scale[F::kGroups];
      GLOAM_UNROLL
      for (int i = 0; i < F::kGroups; ++i) scale[i] = hn::Load(df, chunk->scales[run][i] + lane);
      const VF min = F::kHasMin ? hn::Load(df, chunk->mins[run] + lane) : hn::Zero(df);
      const auto quad = [&](int j) HWY_ATTR { return hn::Load(du, quads + j * kPanelRows); };
      AddRun<DotT, F, kRows>(x_run, scale, min, quad, sum);
    }
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) hn::Store(sum[r], df, row_sums + r * kPanelRows);
  }
};

// All columns of a strip of a panel for the few rows of one group, unpacking in registers.
template <typename DotT, typename F, int kRows, int kGroupRows>
void MultiplyFewRows(const PackedWeight& weight, int64_t panel, const QuantizedRows& x, int lane,
                     float* sums) {
  using XRun = ActivationRun<kGroupRows>;
  // Into the L2 cache; the best of 0 to 64 KiB. Into the L1 cache a third slower (EPYC Zen 4,
  // SmolLM2-135M with 2 threads, 2026-11-23).
  constexpr int64_t kAhead = 8192;
  const std::byte* packed = weight.Panel(panel);
  const std::byte* scales = packed + weight.layout().scale_offset;
  XRun x_run = {x.data, 0};
  VF sum[kRows];
  GLOAM_UNROLL
  for (int r = 0; r < kRows; ++r) sum[r] = hn::Zero(df);
  for (int64_t run = 0; run < weight.num_runs(); ++run, packed += F::kRunBytes) {
    for (int i = 0; i < F::kRunBytes; i += 64) __builtin_prefetch(packed + kAhead + i, 0, 2);
    VU quads[kQuadsPerRun];
    UnpackQuads<F::kBits>(packed, lane, quads);
    VF scale[F::kGroups];
    VF min = hn::Zero(df);
    LoadScales<F>(scales, run, lane, scale, min);
    const auto quad = [&](int j) HWY_ATTR { return quads[j]; };
    AddRun<DotT, F, kRows>(x_run, scale, min, quad, sum);
    x_run.group += XRun::kBytes;
  }
  GLOAM_UNROLL
  for (int r = 0; r < kRows; ++r) hn::Store(sum[r], df, sums + r * kPanelRows + lane);
}

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
void StoreSums(float* sums, int num_rows, const PanelOutput& out) {
  if (out.precise) {
    num_rows /= 2;
    for (int row = 0; row < num_rows; ++row) {
      for (int lane = 0; lane < kPanelRows; lane += kLanes) {
        const float* both = sums + 2 * row * kPanelRows + lane;
        hn::Store(hn::Add(hn::Load(df, both), hn::Load(df, both + kPanelRows)), df,
                  sums + row * kPanelRows + lane);
      }
    }
  }
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

// One panel of a quantised weight; sums is [num_rows][16].
template <bool kVnni>
struct MultiplyPanel {
  const PackedWeight& weight;
  int64_t panel;
  const QuantizedRows& x;
  int num_rows;
  float* sums;

#if HWY_TARGET == HWY_AVX3
  template <typename F>
  using DotOf = std::conditional_t<kVnni, DotVnni, Dot<F::kBits == 8>>;
#else
  template <typename F>
  using DotOf = Dot<F::kBits == 8>;
#endif

  template <typename F>
  void Run() const {
    if (x.group_rows < kRowGroup) return RunFew<F, 1>();
    std::memset(sums, 0, num_rows * kPanelRows * sizeof(float));
    QuantChunk chunk;
    for (int64_t run = 0; run < weight.num_runs(); run += kChunkRuns) {
      LoadChunk<F>(weight, panel, run, chunk);
      for (int lane = 0; lane < kPanelRows; lane += kLanes) {
        const ChunkTile<DotOf<F>, F> tile = {&chunk, x, run, lane, sums};
        RunTiles<kTileRows>(tile, 0, num_rows);
      }
    }
  }

  // All rows are one group of kRows or more.
  template <typename F, int kRows>
  void RunFew() const {
    if constexpr (kRows < kFewRows) {
      if (num_rows > kRows) return RunFew<F, kRows + 1>();
    }
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      MultiplyFewRows<DotOf<F>, F, kRows, kRows>(weight, panel, x, lane, sums);
    }
  }
};

void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PanelOutput& out) {
  alignas(64) float sums[kMaxRowsPerCall * kPanelRows];
#if HWY_TARGET == HWY_AVX3
  if (UseVnni()) {
    WithFormat(weight.type(), MultiplyPanel<true>{weight, panel, x, num_rows, sums});
  } else {
    WithFormat(weight.type(), MultiplyPanel<false>{weight, panel, x, num_rows, sums});
  }
#else
  WithFormat(weight.type(), MultiplyPanel<false>{weight, panel, x, num_rows, sums});
#endif
  StoreSums(sums, num_rows, out);
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

constexpr int kRunVectors = kRunElements / kLanes;

// Quantises 32 elements into row `row` of a group's run.
HWY_INLINE void QuantizeRun(const VF x[kRunVectors], int row, int group_rows, std::byte* run,
                            VF rounded[kRunVectors]) {
  VF max = hn::Zero(df);
  GLOAM_UNROLL
  for (int i = 0; i < kRunVectors; ++i) max = hn::Max(max, hn::Abs(x[i]));
  const float largest = hn::GetLane(hn::MaxOfLanes(df, max));
  // Blocks so small that 127 / largest would overflow count as zero.
  const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  const float scale = largest / 127.0f;
  auto* quants = reinterpret_cast<int8_t*>(run) + row * kRunElements;
  VI half_sums[2] = {hn::Zero(di), hn::Zero(di)};
  GLOAM_UNROLL
  for (int i = 0; i < kRunVectors; ++i) {
    const VI quant = hn::NearestInt(hn::Mul(x[i], hn::Set(df, inverse)));
    VI& half_sum = half_sums[i * 2 / kRunVectors];
    half_sum = hn::Add(half_sum, quant);
    const hn::Rebind<int8_t, DF> d8;
    hn::StoreU(hn::DemoteTo(d8, quant), d8, quants + i * kLanes);
    rounded[i] = hn::Mul(hn::Set(df, scale), hn::ConvertTo(df, quant));
  }
  const int32_t sum = hn::GetLane(hn::SumOfLanes(di, hn::Add(half_sums[0], half_sums[1])));
  const int32_t half_sum = hn::GetLane(hn::SumOfLanes(di, half_sums[0]));
  const float floats[2] = {scale, scale * static_cast<float>(sum)};
  const int32_t negated_sums[2] = {-sum, -half_sum};
  std::byte* fields = run + group_rows * kRunElements + 4 * row;
  for (int i = 0; i < 2; ++i) {
    std::memcpy(fields + 4 * group_rows * i, &floats[i], 4);
    std::memcpy(fields + 4 * group_rows * (i + 2), &negated_sums[i], 4);
  }
}

void QuantizeRow(const float* x, bool precise, const QuantizedRows& out, int64_t row) {
  const int in_group = static_cast<int>(row % out.group_rows);
  std::byte* run = out.Skip(row - in_group).data;
  for (int64_t i = 0; i < out.num_runs; ++i, x += kRunElements) {
    VF values[kRunVectors];
    VF rounded[kRunVectors];
    GLOAM_UNROLL
    for (int v = 0; v < kRunVectors; ++v) values[v] = hn::LoadU(df, x + v * kLanes);
    QuantizeRun(values, in_group, out.group_rows, run, rounded);
    if (precise) {
      GLOAM_UNROLL
      for (int v = 0; v < kRunVectors; ++v) values[v] = hn::Sub(values[v], rounded[v]);
      QuantizeRun(values, in_group + 1, out.group_rows, run, rounded);
    }
    run += out.group_rows * QuantizedRows::kBytesPerRun;
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

void QuantizeRow(const float* x, bool precise, const QuantizedRows& out, int64_t row) {
  HWY_DYNAMIC_DISPATCH(QuantizeRow)(x, precise, out, row);
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
