// Unpacking of panels for the matrix kernels, once per instruction set: quants to bytes, scales to
// fp32, and whole columns to fp32.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "kernels/cpu/gemm/packed_weight.h"
#include "kernels/cpu/gemm/quant_chunk.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/vectors-inl.h"

#if defined(GLOAM_GEMM_UNPACK_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_GEMM_UNPACK_INL_H
#undef GLOAM_GEMM_UNPACK_INL_H
#else
#define GLOAM_GEMM_UNPACK_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

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

// Unpacks `num_runs` runs of a panel from `first_run` on.
template <typename F>
void LoadChunk(const PackedWeight& weight, int64_t panel, int64_t first_run, int num_runs,
               QuantChunk& chunk) {
  const std::byte* data = weight.Panel(panel);
  const std::byte* quants = data + first_run * F::kRunBytes;
  const std::byte* scales = data + weight.layout().scale_offset;
  chunk.num_runs = num_runs;
  chunk.quants = F::kBits == 8 ? reinterpret_cast<const uint8_t*>(quants) : chunk.storage;
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
    const int64_t runs_left = weight.num_runs() - first_run;
    LoadChunk<F>(weight, panel, first_run,
                 static_cast<int>(std::min<int64_t>(kChunkRunsF32, runs_left)), chunk);
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

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
