// Layout of GGUF weights on the device, and its decoding in registers.
//
// A unit is 16 rows, a stage 128 columns of them (four runs of 32); a weight is [units][stages]
// [PackedStage<type>::kBytes], rows and columns padded with zeros. A stage holds, for 4, 5 and 6
// bits, what lane (g = lane / 4, t = lane % 4) of a warp feeds to mma.m16n8k16 as A: of rows g and
// g + 8 the eight columns of every run that ColumnOf(t, i) names.
//   nibbles  [2 pairs of runs][32 lanes][4 words: (run, row g), (run, g + 8), (run + 1, g), ...]
//            bits [4p, 4p + 4) and [16 + 4p, 20 + 4p) of a word are elements 2p and 2p + 1
//   fifth    [2 pairs of runs][32 lanes][1 word]: bits 4j + p and 16 + 4j + p belong to elements
//            2p and 2p + 1 of the pair's word j
//   pairs    [2 pairs of runs][32 lanes][2 words, one a run]: 2 bits at 8r + 2p and 16 + 8r + 2p
//            are elements 2p and 2p + 1 of row g + 8r
//   bytes    (8 bits, instead) [4 runs][32 lanes][4 words: row g: elements 0, 2, 1, 3 and 4, 6, 5,
//            7; row g + 8]
// and then the scales:
//   Q4_0 Q5_0 Q8_0  [2 pairs of runs][8 rows g][run, row g; run, row g + 8; run + 1, row g; ...]
//                   fp16
//   Q4_1 Q5_1       the same of fp16 scale, fp16 min
//   Q4_K Q5_K       [16 rows] fp16 scale, fp16 min; [16 rows] word, [16 rows] half word: 6 bits
//                   each of sub-scale and sub-min of four runs, 48 in all, low bits first
//   Q6_K            [16 rows] fp16 scale; [4 runs][16 rows] two sub-scales, 128 added, as bytes
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "kernels/cuda/gemm/common.cuh"
#include "kernels/quant_block.h"

namespace gloam::cuda {

inline constexpr int kStageColumns = 128;
inline constexpr int kSubScaleBias = 128;  // of Q6_K
inline constexpr int kRunsPerStage = kStageColumns / kRunElements;

__host__ __device__ constexpr int64_t NumStages(int64_t cols) {
  return (cols + kStageColumns - 1) / kStageColumns;
}
__host__ __device__ constexpr int64_t NumUnits(int64_t rows) {
  return (rows + kUnitRows - 1) / kUnitRows;
}

// Calls function.operator()<type>() for a quantised type.
template <typename Function>
void DispatchQuantized(WeightType type, Function&& function) {
  switch (type) {
    case WeightType::kQ4_0:
      return function.template operator()<WeightType::kQ4_0>();
    case WeightType::kQ4_1:
      return function.template operator()<WeightType::kQ4_1>();
    case WeightType::kQ5_0:
      return function.template operator()<WeightType::kQ5_0>();
    case WeightType::kQ5_1:
      return function.template operator()<WeightType::kQ5_1>();
    case WeightType::kQ8_0:
      return function.template operator()<WeightType::kQ8_0>();
    case WeightType::kQ4_K:
      return function.template operator()<WeightType::kQ4_K>();
    case WeightType::kQ5_K:
      return function.template operator()<WeightType::kQ5_K>();
    case WeightType::kQ6_K:
      return function.template operator()<WeightType::kQ6_K>();
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      break;
  }
  GLOAM_CHECK(!"a quantised weight type");
}

// Where a lane copies a weight from that lies as [units][stages][kUnitBytes]: a stage of a unit.
template <int kUnitBytes>
struct PanelSource {
  const char* data = nullptr;
  int64_t unit_bytes = 0;

  __device__ __forceinline__ void Find(const GemmSegment& segment, int unit, int stage, int k,
                                       int lane) {
    unit_bytes = NumStages(k) * kUnitBytes;
    data = static_cast<const char*>(segment.weight) + unit * unit_bytes +
           int64_t{stage} * kUnitBytes + 16 * lane;
  }
  __device__ __forceinline__ void MoveUnits(int n) { data += n * unit_bytes; }
  __device__ __forceinline__ void MoveStages(int n) { data += n * kUnitBytes; }

  // `to`: where this lane's first 16 bytes go.
  __device__ __forceinline__ void Request(uint32_t to, int lane) const {
#pragma unroll
    for (int i = 0; i < kUnitBytes / 512; ++i) CopyAsync16(to + 512 * i, data + 512 * i);
    constexpr int kRest = kUnitBytes % 512;
    if constexpr (kRest > 0) {
      CopyAsync16If(16 * lane < kRest, to + (kUnitBytes - kRest), data + (kUnitBytes - kRest));
    }
  }
};

// Column within its run of the i-th (0..7) element that lane 4g + t holds. Q6_K has a scale per 16
// columns, so that each of the two products of a run must stay within one half.
template <bool kHalves>
__host__ __device__ constexpr int ColumnOf(int t, int i) {
  return kHalves ? 16 * (i / 4) + 4 * t + i % 4 : 8 * t + i;
}

template <WeightType kType>
struct PackedStage {
  static constexpr QuantTraits kTraits = QuantTraitsOf(kType);
  static constexpr int kBits = kTraits.bits;
  static constexpr bool kHasMin = kTraits.has_min;
  static constexpr bool kIsK = kTraits.is_k_quant;
  static constexpr bool kHalves = kTraits.scales_per_run == 2;
  static constexpr int kQuantBytes = 16 * kStageColumns * kBits / 8;
  static constexpr int kHighOffset = 16 * kStageColumns / 2;  // of fifth bits or pairs
  // What UnpackRunPair multiplies the odd pairs of elements by, too.
  static constexpr int kOddFactor = kBits == 4 ? 16 : 1;
  static constexpr int kScaleOffset = kQuantBytes;
  static constexpr int kScaleBytes = kIsK ? 16 * 10 : 16 * kRunsPerStage * (kHasMin ? 4 : 2);
  static constexpr int kBytes = kQuantBytes + kScaleBytes;
};

// The scales of one run and one row: w = s[half] * (q - offset) - m.
struct RunScale {
  float s[2];
  float m;
};

// An integer below 2^23, at the rate of an addition (conversions run at a quarter of it).
__device__ __forceinline__ float SmallToFloat(uint32_t value) {
  return __uint_as_float(0x4b000000 | value) - 0x1p23f;
}

// Where the scale of a run and a row is among those of types that are not K-quants.
__host__ __device__ constexpr int ScaleIndex(int run, int row) {
  return (run / 2 * 8 + row % 8) * 4 + run % 2 * 2 + row / 8;
}

template <WeightType kType>
__device__ __forceinline__ RunScale LoadScale(const char* stage, int run, int row) {
  using P = PackedStage<kType>;
  const char* scales = stage + P::kScaleOffset;
  RunScale out;
  out.m = 0;
  if constexpr (P::kHalves) {
    const float d = __half2float(reinterpret_cast<const __half*>(scales)[row]);
    const uint32_t sub = reinterpret_cast<const uint16_t*>(scales + 32)[16 * run + row];
    out.s[0] = d * (SmallToFloat(sub & 0xff) - kSubScaleBias);
    out.s[1] = d * (SmallToFloat(sub >> 8) - kSubScaleBias);
  } else if constexpr (P::kIsK) {
    const float2 d = __half22float2(reinterpret_cast<const __half2*>(scales)[row]);
    const uint32_t low = reinterpret_cast<const uint32_t*>(scales + 64)[row];
    const uint32_t high = reinterpret_cast<const uint16_t*>(scales + 128)[row];
    const uint32_t bits = run == 3 ? high >> 4 : __funnelshift_r(low, high, 12 * run);
    out.s[0] = out.s[1] = d.x * SmallToFloat(bits & 63);
    out.m = d.y * SmallToFloat(bits >> 6 & 63);
  } else if constexpr (P::kHasMin) {
    const float2 d = __half22float2(reinterpret_cast<const __half2*>(scales)[ScaleIndex(run, row)]);
    out.s[0] = out.s[1] = d.x;
    out.m = -d.y;
  } else {
    out.s[0] = out.s[1] =
        __half2float(reinterpret_cast<const __half*>(scales)[ScaleIndex(run, row)]);
  }
  return out;
}

// The scales of a pair of runs. Rows g and g + 8 are shared by four lanes; of K-quants each decodes
// one of the four scales: lane t that of run t % 2 and row g + 8 * (t / 2).
template <WeightType kType>
class PairScales {
 public:
  using P = PackedStage<kType>;

  __device__ __forceinline__ PairScales(const char* stage, int pair, int lane) : lane_(lane) {
    const char* scales = stage + P::kScaleOffset;
    if constexpr (P::kIsK) {
      own_ = LoadScale<kType>(stage, 2 * pair + lane % 2, lane / 4 + 8 * (lane / 2 % 2));
    } else if constexpr (P::kHasMin) {
      const uint4 four = reinterpret_cast<const uint4*>(scales)[8 * pair + lane / 4];
      memcpy(halves_, &four, sizeof(four));
    } else {
      const uint2 four = reinterpret_cast<const uint2*>(scales)[8 * pair + lane / 4];
      memcpy(halves_, &four, sizeof(four));
    }
  }

  // Of run 2 * pair + r and row g + 8 * hi.
  __device__ __forceinline__ RunScale Get(int r, int hi) const {
    if constexpr (P::kIsK) {
      const int from = (lane_ & ~3) + 2 * hi + r;
      RunScale out;
      out.s[0] = out.s[1] = __shfl_sync(0xffffffff, own_.s[0], from);
      if constexpr (P::kHalves) out.s[1] = __shfl_sync(0xffffffff, own_.s[1], from);
      out.m = P::kHasMin ? __shfl_sync(0xffffffff, own_.m, from) : 0;
      return out;
    } else if constexpr (P::kHasMin) {
      const float2 d = __half22float2(halves_[2 * r + hi]);
      return {{d.x, d.x}, -d.y};
    } else {
      const float2 both = __half22float2(halves_[r]);
      const float s = hi ? both.y : both.x;
      return {{s, s}, 0};
    }
  }

 private:
  int lane_;
  RunScale own_;       // of K-quants
  __half2 halves_[4];  // (scale, min) of run r and row g + 8 * hi in [2 * r + hi]; without a min,
                       // scales of rows g and g + 8 in [r]
};

// acc += a tile's products of one run, times the scales of its rows g and g + 8.
__device__ __forceinline__ void AddScaled(const float (&part)[4], float low, float high,
                                          float (&acc)[4]) {
  acc[0] = fmaf(part[0], low, acc[0]);
  acc[1] = fmaf(part[1], low, acc[1]);
  acc[2] = fmaf(part[2], high, acc[2]);
  acc[3] = fmaf(part[3], high, acc[3]);
}

__device__ __forceinline__ __nv_bfloat162 AsBF16x2(uint32_t bits) {
  __nv_bfloat162 out;
  memcpy(&out, &bits, 4);
  return out;
}
__device__ __forceinline__ uint32_t BitsOf(__nv_bfloat162 value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
__device__ __forceinline__ uint32_t SubtractBF16x2(uint32_t a, uint32_t b) {
  return BitsOf(__hsub2(AsBF16x2(a), AsBF16x2(b)));
}
__device__ __forceinline__ uint32_t MultiplyBF16x2(uint32_t a, uint32_t b) {
  return BitsOf(__hmul2(AsBF16x2(a), AsBF16x2(b)));
}

// (a & b) | c in one instruction, which the compiler does not find where b and c are constants.
__device__ __forceinline__ uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// The integers q of one pair of runs, two to a word: of run `2 * pair + r` and row g + 8 * hi,
// element pair p is out[r][hi][p], times kOddFactor where p is odd. As bf16 these are 2^-133 of the
// integers, exactly: the tensor cores know subnormals.
template <WeightType kType>
__device__ __forceinline__ void UnpackRunPair(const char* stage, int pair, int lane,
                                              uint32_t (&out)[2][2][4]) {
  using P = PackedStage<kType>;
  if constexpr (P::kBits == 8) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 words = reinterpret_cast<const uint4*>(stage)[32 * (2 * pair + r) + lane];
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[r][j / 2][2 * (j % 2)] = word[j] & 0x00ff00ff;
        out[r][j / 2][2 * (j % 2) + 1] = word[j] >> 8 & 0x00ff00ff;
      }
    }
  } else {
    const uint4 words = reinterpret_cast<const uint4*>(stage)[32 * pair + lane];
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    uint32_t high[2] = {};
    if constexpr (P::kBits == 5) {
      high[0] = reinterpret_cast<const uint32_t*>(stage + P::kHighOffset)[32 * pair + lane];
    } else if constexpr (P::kBits == 6) {
      const uint2 both = reinterpret_cast<const uint2*>(stage + P::kHighOffset)[32 * pair + lane];
      high[0] = both.x;
      high[1] = both.y;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        uint32_t& bits = out[j / 2][j % 2][p];
        if constexpr (P::kBits == 4) {
          bits = (p < 2 ? word[j] : word[j] >> 8) & (p % 2 == 0 ? 0x000f000f : 0x00f000f0);
        } else {
          bits = word[j] >> (4 * p) & 0x000f000f;
        }
        if constexpr (P::kBits == 5) {
          const int at = 4 * j + p;
          bits = AndOr(at >= 4 ? high[0] >> (at - 4) : high[0] << (4 - at), 0x00100010, bits);
        } else if constexpr (P::kBits == 6) {
          const int at = 8 * (j % 2) + 2 * p;
          bits =
              AndOr(at >= 4 ? high[j / 2] >> (at - 4) : high[j / 2] << (4 - at), 0x00300030, bits);
        }
      }
    }
  }
}

// The same as bf16 (q - offset), exactly; costs a few instructions more.
template <WeightType kType>
__device__ __forceinline__ void UnpackRunPairExactly(const char* stage, int pair, int lane,
                                                     uint32_t (&out)[2][2][4]) {
  using P = PackedStage<kType>;
  constexpr uint32_t kOne28 = 0x43004300;  // bf16 128: seven mantissa bits count ones
  constexpr uint32_t kOffset = P::kTraits.offset << 16 | P::kTraits.offset;
  UnpackRunPair<kType>(stage, pair, lane, out);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int hi = 0; hi < 2; ++hi) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        uint32_t& q = out[r][hi][p];
        if constexpr (P::kBits == 8) {
          // 128 + low seven bits, less 128 or (top bit clear) 256: q - 128.
          q = SubtractBF16x2(AndOr(q, 0x007f007f, kOne28), (q & 0x00800080) ^ 0x43804380);
        } else {
          if (p % 2 == 1 && P::kOddFactor == 16) q >>= 4;
          q = SubtractBF16x2(q | kOne28, kOne28 + kOffset);
        }
      }
    }
  }
}

}  // namespace gloam::cuda
