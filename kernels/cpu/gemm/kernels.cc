#include "kernels/cpu/gemm/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "base/check.h"
#include "kernels/cpu/ceil_div.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_targets.h"
#include "kernels/cpu/vnni.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm/kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

#include "kernels/cpu/gemm/dot-inl.h"
#include "kernels/cpu/gemm/unpack-inl.h"
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// A register tile: rows of activations times strips of the panel, with two accumulators each. With
// the 16 registers of AVX2, those that wait for the end of a run lie in the L1 cache.
static_assert(kPanelRows == kNeighbours);
constexpr int kTileRows = HWY_TARGET == HWY_AVX3 ? 8 : 4;
constexpr int kTileStrips = HWY_TARGET == HWY_AVX2 ? 2 : 1;

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
  int32_t Offset(int r) const { return Field<int32_t>(2, r); }
  int32_t HalfOffset(int r) const { return Field<int32_t>(3, r); }

  template <typename T>
  T Field(int field, int r) const {
    T value;
    std::memcpy(&value, group + kGroupRows * (kRunElements + 4 * field) + 4 * (row + r), 4);
    return value;
  }
};

// Scales and mins of a run for kWidth strips of the panel.
template <typename F, int kWidth>
struct RunScales {
  VF scale[kWidth][F::kGroups];
  VF min[kWidth];
};

// dot[r][s] += the products of quads [begin, begin + kCount) of a run; quad(j, s) is quad j of
// strip s.
template <typename DotT, int kRows, int kWidth, int kCount, typename Run, typename QuadOf>
HWY_INLINE void AddQuads(const Run& x, const QuadOf& quad, int begin, VI dot[kRows][kWidth]) {
  if constexpr (DotT::kQuads == 0) {
    GLOAM_UNROLL
    for (int j = begin; j < begin + kCount; ++j) {
      GLOAM_UNROLL
      for (int s = 0; s < kWidth; ++s) {
        const auto w = DotT::Prepare(quad(j, s));
        GLOAM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          dot[r][s] = DotT::MulAdd(dot[r][s], w, x.Quants(r) + 4 * j);
        }
      }
    }
  } else {
    constexpr int kStep = DotT::kQuads < kCount ? DotT::kQuads : kCount;
    GLOAM_UNROLL
    for (int first = begin; first < begin + kCount; first += kStep) {
      typename DotT::Part part[kRows][kWidth];
      const auto add = [&](int j, auto is_first) HWY_ATTR {
        typename DotT::Weights w[kWidth];
        GLOAM_UNROLL
        for (int s = 0; s < kWidth; ++s) w[s] = DotT::Prepare(quad(j, s));
        GLOAM_UNROLL
        for (int r = 0; r < kRows; ++r) {
          GLOAM_UNROLL
          for (int s = 0; s < kWidth; ++s) {
            const auto products = DotT::Mul(w[s], x.Quants(r) + 4 * j);
            if constexpr (decltype(is_first)::value) {
              part[r][s] = products;
            } else {
              part[r][s] = DotT::Add(part[r][s], products);
            }
          }
        }
      };
      add(first, std::true_type());
      GLOAM_UNROLL
      for (int j = first + 1; j < first + kStep; ++j) add(j, std::false_type());
      GLOAM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        GLOAM_UNROLL
        for (int s = 0; s < kWidth; ++s) dot[r][s] = DotT::Total(dot[r][s], part[r][s]);
      }
    }
  }
}

// sum[r][s] += the products of one run, for kRows rows of activations and kWidth strips of the
// panel.
template <typename DotT, typename F, int kRows, int kWidth, typename Run, typename QuadOf>
HWY_INLINE void AddRun(const Run& x, const RunScales<F, kWidth>& scales, const QuadOf& quad,
                       VF sum[kRows][kWidth]) {
  constexpr int kGroupQuads = kQuadsPerRun / F::kGroups;
  GLOAM_UNROLL
  for (int group = 0; group < F::kGroups; ++group) {
    VI dot[kRows][kWidth];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      VI first = hn::Zero(di);
      if constexpr (!F::kHasMin && !DotT::kSigned) {
        first = hn::Set(di, F::kGroups == 1 ? x.Offset(r) : x.HalfOffset(r));
        if (group == 1) first = hn::Sub(hn::Set(di, x.Offset(r)), first);
        first = hn::ShiftRight<7 - F::kLogOffset>(first);
      }
      GLOAM_UNROLL
      for (int s = 0; s < kWidth; ++s) dot[r][s] = first;
    }
    AddQuads<DotT, kRows, kWidth, kGroupQuads>(x, quad, group * kGroupQuads, dot);
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VF x_scale = hn::Set(df, x.Scale(r));
      GLOAM_UNROLL
      for (int s = 0; s < kWidth; ++s) {
        const VF both = hn::Mul(scales.scale[s][group], x_scale);
        sum[r][s] = hn::MulAdd(hn::ConvertTo(df, dot[r][s]), both, sum[r][s]);
      }
    }
  }
  if constexpr (F::kHasMin) {
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VF scaled_sum = hn::Set(df, x.ScaledSum(r));
      GLOAM_UNROLL
      for (int s = 0; s < kWidth; ++s) {
        sum[r][s] = hn::MulAdd(scales.min[s], scaled_sum, sum[r][s]);
      }
    }
  }
}

// kRows rows of activations times kTileStrips strips of a panel, over one unpacked chunk of
// columns. Asks for its share of what is read next: all of it at once would fill the queues of
// outstanding loads.
template <typename DotT, typename F>
struct ChunkTile {
  const QuantChunk* chunk;
  QuantizedRows x;        // first row of the call, groups of kRowGroup
  int64_t first_run;      // of the chunk
  int lane;               // of the first strip
  float* sums;            // [num_rows][16]
  const std::byte* next;  // what is read next
  int64_t next_bytes;     // of it, per row of activations

  template <int kRows>
  void Run(int first_row) const {
    PrefetchRange(next + first_row * next_bytes, kRows * next_bytes);
    using XRun = ActivationRun<kRowGroup>;
    const QuantizedRows group = x.Skip(first_row / kRowGroup * kRowGroup);
    XRun x_run = {group.data + first_run * XRun::kBytes, first_row % kRowGroup};
    float* row_sums = sums + first_row * kPanelRows + lane;
    VF sum[kRows][kTileStrips];
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GLOAM_UNROLL
      for (int s = 0; s < kTileStrips; ++s) {
        sum[r][s] =
            first_run == 0 ? hn::Zero(df) : hn::Load(df, row_sums + r * kPanelRows + s * kLanes);
      }
    }
    for (int run = 0; run < chunk->num_runs; ++run, x_run.group += XRun::kBytes) {
      const auto* quads =
          reinterpret_cast<const uint32_t*>(chunk->quants + run * kRunQuantBytes) + lane;
      RunScales<F, kTileStrips> scales;
      GLOAM_UNROLL
      for (int s = 0; s < kTileStrips; ++s) {
        GLOAM_UNROLL
        for (int i = 0; i < F::kGroups; ++i) {
          scales.scale[s][i] = hn::Load(df, chunk->scales[run][i] + lane + s * kLanes);
        }
        if constexpr (F::kHasMin) {
          scales.min[s] = hn::Load(df, chunk->mins[run] + lane + s * kLanes);
        }
      }
      const auto quad = [&](int j, int s)
                            HWY_ATTR { return hn::Load(du, quads + j * kPanelRows + s * kLanes); };
      AddRun<DotT, F, kRows, kTileStrips>(x_run, scales, quad, sum);
    }
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GLOAM_UNROLL
      for (int s = 0; s < kTileStrips; ++s) {
        hn::Store(sum[r][s], df, row_sums + r * kPanelRows + s * kLanes);
      }
    }
  }
};

// All columns of a panel for the few rows of one group, unpacking in registers.
template <typename DotT, typename F, int kRows, int kGroupRows>
void MultiplyFewRows(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                     float* sums) {
  using XRun = ActivationRun<kGroupRows>;
  // Into the L2 cache; the best of 0 to 64 KiB. Into the L1 cache a third slower (EPYC Zen 4,
  // SmolLM2-135M with 2 threads, 2026-11-23).
  constexpr int64_t kAhead = 8192;
  const std::byte* packed = weight.Panel(panel);
  const std::byte* panel_scales = packed + weight.layout().scale_offset;
  XRun x_run = {x.data, 0};
  VF sum[kStrips][kRows][1];
  GLOAM_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) sum[s][r][0] = hn::Zero(df);
  }
  for (int64_t run = 0; run < weight.num_runs(); ++run, packed += F::kRunBytes) {
    for (int i = 0; i < F::kRunBytes; i += 64) __builtin_prefetch(packed + kAhead + i, 0, 2);
    for (int s = 0; s < kStrips; ++s) {
      VU quads[kQuadsPerRun];
      UnpackQuads<F::kBits>(packed, s * kLanes, quads);
      RunScales<F, 1> scales;
      LoadScales<F>(panel_scales, run, s * kLanes, scales.scale[0], scales.min[0]);
      const auto quad = [&](int j, int) HWY_ATTR { return quads[j]; };
      AddRun<DotT, F, kRows, 1>(x_run, scales, quad, sum[s]);
    }
    x_run.group += XRun::kBytes;
  }
  GLOAM_UNROLL
  for (int s = 0; s < kStrips; ++s) {
    GLOAM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      hn::Store(sum[s][r][0], df, sums + r * kPanelRows + s * kLanes);
    }
  }
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

// Results of `num_cols` columns from first_column on; sums: [num_rows][16].
void KeepLargest(const float* sums, int num_rows, int num_cols, int64_t first_column,
                 LargestResults largest) {
  for (int row = 0; row < num_rows; ++row, sums += kPanelRows, largest = largest.Skip(1)) {
    bool none = true;
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      const auto candidates = hn::Ge(hn::Load(df, sums + lane), hn::Set(df, *largest.values));
      none = none && hn::AllFalse(df, candidates);
    }
    if (none) continue;  // as in nearly all panels
    for (int i = 0; i < num_cols; ++i) {
      largest.Take(sums[i], static_cast<int32_t>(first_column + i));
    }
  }
}

// sums: [num_rows][16], complete.
void StoreSums(float* sums, int num_rows, int64_t panel, const PanelOutput& out) {
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
  if (out.largest.values != nullptr) {
    return KeepLargest(sums, num_rows, out.num_cols, panel * kPanelRows, out.largest);
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
  const PackedBytes& next;
  float* sums;

#if HWY_TARGET == HWY_AVX3
  template <typename F>
  using DotOf = std::conditional_t<kVnni, DotVnni, Dot<F::kBits>>;
#else
  template <typename F>
  using DotOf = Dot<F::kBits>;
#endif

  template <typename F>
  void Run() const {
    if (x.group_rows < kRowGroup) return RunFew<F, 1>();
    QuantChunk chunk;
    const int64_t num_chunks = CeilDiv(weight.num_runs(), kMaxChunkRuns);
    const int64_t chunk_runs = CeilDiv(weight.num_runs(), num_chunks);
    // Rounded up: past the end of what is next a prefetch is forgiven.
    const int64_t next_bytes = CeilDiv(next.count, num_chunks * num_rows);
    for (int64_t run = 0; run < weight.num_runs(); run += chunk_runs) {
      const int64_t num_runs = std::min(chunk_runs, weight.num_runs() - run);
      LoadChunk<F>(weight, panel, run, static_cast<int>(num_runs), chunk);
      const std::byte* next_of_chunk = next.data + run / chunk_runs * num_rows * next_bytes;
      for (int lane = 0; lane < kPanelRows; lane += kTileStrips * kLanes) {
        const ChunkTile<DotOf<F>, F> tile = {
            &chunk, x, run, lane, sums, next_of_chunk, lane == 0 ? next_bytes : 0};
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
    MultiplyFewRows<DotOf<F>, F, kRows, kRows>(weight, panel, x, sums);
  }
};

void MultiplyPanelInt8(const PackedWeight& weight, int64_t panel, const QuantizedRows& x,
                       int num_rows, const PackedBytes& next, const PanelOutput& out) {
  alignas(64) float sums[kMaxRowsPerCall * kPanelRows];
  if (out.largest.values == nullptr) {
    // Rows of y lie far apart, and many of their lines are in another core's cache: they come while
    // the sums are made.
    const int num_outputs = out.precise ? num_rows / 2 : num_rows;
    for (int row = 0; row < num_outputs; ++row) PrefetchToWrite(out.y + row * out.row_stride);
  }
#if HWY_TARGET == HWY_AVX3
  if (UseVnni()) {
    WithFormat(weight.type(), MultiplyPanel<true>{weight, panel, x, num_rows, next, sums});
  } else {
    WithFormat(weight.type(), MultiplyPanel<false>{weight, panel, x, num_rows, next, sums});
  }
#else
  WithFormat(weight.type(), MultiplyPanel<false>{weight, panel, x, num_rows, next, sums});
#endif
  StoreSums(sums, num_rows, panel, out);
}

void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out) {
  alignas(64) float sums[kMaxRowsPerCall * kPanelRows];
  alignas(64) float weights[kChunkColsF32 * kPanelRows];
  std::memset(sums, 0, num_rows * kPanelRows * sizeof(float));
  for (int64_t col = 0; col < weight.cols(); col += kChunkColsF32) {
    const int num_cols = static_cast<int>(std::min<int64_t>(kChunkColsF32, weight.cols() - col));
    LoadChunkF32(weight, panel, col, num_cols, weights);
    for (int lane = 0; lane < kPanelRows; lane += kLanes) {
      const F32Tile tile = {weights, num_cols, x + col, x_stride, lane, sums};
      RunTiles<kTileRows>(tile, 0, num_rows);
    }
  }
  StoreSums(sums, num_rows, panel, out);
}

void UnpackRow(const PackedWeight& weight, int64_t row, float* out) {
  alignas(64) float chunk[kChunkColsF32 * kPanelRows];
  const int64_t panel = row / kPanelRows;
  const int64_t lane = row % kPanelRows;
  for (int64_t col = 0; col < weight.cols(); col += kChunkColsF32) {
    const int num_cols = static_cast<int>(std::min<int64_t>(kChunkColsF32, weight.cols() - col));
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
  const int32_t offsets[2] = {-128 * sum, -128 * half_sum};
  std::byte* fields = run + group_rows * kRunElements + 4 * row;
  for (int i = 0; i < 2; ++i) {
    std::memcpy(fields + 4 * group_rows * i, &floats[i], 4);
    std::memcpy(fields + 4 * group_rows * (i + 2), &offsets[i], 4);
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
                       int num_rows, const PackedBytes& next, const PanelOutput& out) {
  GLOAM_CHECK(num_rows <= kMaxRowsPerCall);
  HWY_DYNAMIC_DISPATCH(MultiplyPanelInt8)(weight, panel, x, num_rows, next, out);
}

void MultiplyPanelF32(const PackedWeight& weight, int64_t panel, const float* x, int64_t x_stride,
                      int num_rows, const PanelOutput& out) {
  GLOAM_CHECK(num_rows <= kMaxRowsPerCall);
  HWY_DYNAMIC_DISPATCH(MultiplyPanelF32)(weight, panel, x, x_stride, num_rows, out);
}

void UnpackRow(const PackedWeight& weight, int64_t row, float* out) {
  HWY_DYNAMIC_DISPATCH(UnpackRow)(weight, row, out);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
