// Row-wise operations on fp32. A row is computed by one thread in a fixed order of operations, so
// its result depends on nothing but the row. Traffic-bound: each reads and writes its tensors once.
#include "kernels/elementwise.h"

#include <cmath>
#include <cstring>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/row_tasks.h"
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void RmsNormRow(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  const hn::CappedTag<float, 16> d;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = hn::Lanes(d);
  // Two sums hide the latency of the additions.
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= dim; i += 2 * lanes) {
    const auto x0 = hn::LoadU(d, x + i);
    const auto x1 = hn::LoadU(d, x + i + lanes);
    sum0 = hn::MulAdd(x0, x0, sum0);
    sum1 = hn::MulAdd(x1, x1, sum1);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
  for (; i < dim; ++i) sum += x[i] * x[i];

  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
  const auto apply = [&](auto tag, int64_t at) HWY_ATTR {
    const auto scaled = hn::Mul(hn::LoadU(tag, x + at), hn::Set(tag, scale));
    hn::StoreU(hn::Mul(scaled, hn::LoadU(tag, weight + at)), tag, out + at);
  };
  for (i = 0; i + lanes <= dim; i += lanes) apply(d, i);
  for (; i < dim; ++i) apply(d1, i);
}

void SiluMulRow(const float* gate, const float* up, int64_t dim, float* out) {
  const hn::CappedTag<float, 16> d;
  const hn::CappedTag<float, 1> d1;
  const int64_t lanes = hn::Lanes(d);
  const auto apply = [&](auto tag, int64_t at) HWY_ATTR {
    const auto g = hn::LoadU(tag, gate + at);
    // exp is defined up to 104; past 80 the result is 0 to fp32 precision either way.
    const auto exp = hn::Exp(tag, hn::Min(hn::Neg(g), hn::Set(tag, 80.0f)));
    const auto silu = hn::Div(g, hn::Add(exp, hn::Set(tag, 1.0f)));
    hn::StoreU(hn::Mul(silu, hn::LoadU(tag, up + at)), tag, out + at);
  };
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) apply(d, i);
  for (; i < dim; ++i) apply(d1, i);
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(RmsNormRow);
HWY_EXPORT(SiluMulRow);

namespace {

// Elements that one thread handles in 3 to 5 us, the least that is worth a second thread
// (2.x GHz Xeon with AVX-512, 2026-11).
constexpr int64_t kRmsNormGrain = 1 << 13;
constexpr int64_t kSiluMulGrain = 1 << 13;

}  // namespace

void RmsNorm(const RmsNormParams& params, ThreadPool& pool) {
  const TensorView& x = params.x;
  const TensorView& out = params.out;
  GLOAM_CHECK(x.rank == 2 || x.rank == 3);
  GLOAM_CHECK(out.rank == x.rank && out.shape == x.shape);
  const int64_t heads = x.rank == 3 ? x.shape[1] : 1;
  const int64_t dim = x.shape[x.rank - 1];
  GLOAM_CHECK(dim > 0);
  const int64_t x_head_stride = x.rank == 3 ? x.strides[1] : 0;
  const int64_t out_head_stride = x.rank == 3 ? out.strides[1] : 0;
  const float* x_data = x.Data<float>();
  float* out_data = out.Data<float>();
  const auto kernel = HWY_DYNAMIC_DISPATCH(RmsNormRow);
  ForRows(pool, x.shape[0], heads * dim, kRmsNormGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        kernel(x_data + row * x.strides[0] + head * x_head_stride, params.weight, dim, params.eps,
               out_data + row * out.strides[0] + head * out_head_stride);
      }
    }
  });
}

void SiluMul(const SiluMulParams& params, ThreadPool& pool) {
  const TensorView& gate = params.gate;
  const TensorView& up = params.up;
  const TensorView& out = params.out;
  GLOAM_CHECK(gate.rank == 2 && up.rank == 2 && out.rank == 2);
  GLOAM_CHECK(up.shape == gate.shape && out.shape == gate.shape);
  const float* gate_data = gate.Data<float>();
  const float* up_data = up.Data<float>();
  float* out_data = out.Data<float>();
  const int64_t dim = gate.shape[1];
  const auto kernel = HWY_DYNAMIC_DISPATCH(SiluMulRow);
  ForRows(pool, gate.shape[0], dim, kSiluMulGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel(gate_data + row * gate.strides[0], up_data + row * up.strides[0], dim,
             out_data + row * out.strides[0]);
    }
  });
}

void GatherRows(const GatherRowsParams& params) {
  const TensorView& x = params.x;
  const TensorView& out = params.out;
  GLOAM_CHECK(x.rank == 2 && out.rank == 2);
  GLOAM_CHECK(out.shape[1] == x.shape[1] && out.dtype == x.dtype);
  const int64_t element_bytes = static_cast<int64_t>(DTypeBytes(x.dtype));
  for (int64_t i = 0; i < out.shape[0]; ++i) {
    const int64_t row = params.row_indices[i];
    GLOAM_CHECK(row >= 0 && row < x.shape[0]);
    std::memcpy(static_cast<char*>(out.data) + i * out.strides[0] * element_bytes,
                static_cast<const char*>(x.data) + row * x.strides[0] * element_bytes,
                static_cast<size_t>(x.shape[1] * element_bytes));
  }
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
