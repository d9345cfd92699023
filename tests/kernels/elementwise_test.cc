#include "kernels/elementwise.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 7;

std::vector<float> Normal(size_t count, std::mt19937& rng, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(rng);
  return values;
}

// A [rows, cols] view whose rows are `stride` apart.
TensorView Matrix(std::vector<float>& data, int64_t rows, int64_t cols, int64_t stride) {
  TensorView view = TensorView::Contiguous(data.data(), DType::kF32, Device::kCpu, {rows, cols});
  view.strides[0] = stride;
  return view;
}

double Silu(double x) { return x / (1 + std::exp(-x)); }

}  // namespace

TEST_CASE("RmsNorm equals the double-precision formula, strided and in place") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(2);
  for (const int64_t dim : {1, 5, 16, 31, 32, 33, 576, 1000, 4096}) {
    for (const int64_t rows : {1, 3, 100}) {
      CAPTURE(dim, rows);
      const int64_t stride = dim + 7;
      std::vector<float> x = Normal(rows * stride, rng, 3);
      const std::vector<float> before = x;
      const std::vector<float> weight = Normal(dim, rng);
      RmsNormParams params;
      params.x = params.out = Matrix(x, rows, dim, stride);
      params.weight = weight.data();
      params.eps = 1e-5f;
      RmsNorm(params, pool);
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < dim; ++i) sum += std::pow(double{before[row * stride + i]}, 2);
        const double scale = 1 / std::sqrt(sum / static_cast<double>(dim) + 1e-5);
        for (int64_t i = 0; i < stride; ++i) {
          const double old = before[row * stride + i];
          const double expected = i < dim ? old * scale * weight[i] : old;
          REQUIRE(x[row * stride + i] == Approx(expected).epsilon(1e-5).margin(1e-12));
        }
      }
    }
  }
}

TEST_CASE("RmsNorm of heads normalises each head of a fused matrix") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(1);
  constexpr int64_t kTokens = 5, kHeads = 3, kDim = 64, kWidth = 400;
  std::vector<float> qkv = Normal(kTokens * kWidth, rng);
  const std::vector<float> before = qkv;
  const std::vector<float> weight = Normal(kDim, rng);
  RmsNormParams params;
  params.x =
      TensorView::Contiguous(qkv.data() + 10, DType::kF32, Device::kCpu, {kTokens, kHeads, kDim});
  params.x.strides[0] = kWidth;
  params.out = params.x;
  params.weight = weight.data();
  RmsNorm(params, pool);
  for (int64_t token = 0; token < kTokens; ++token) {
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t at = token * kWidth + i;
      if (i < 10 || i >= 10 + kHeads * kDim) {
        REQUIRE(qkv[at] == before[at]);
        continue;
      }
      const int64_t head = token * kWidth + 10 + (i - 10) / kDim * kDim;
      double sum = 0;
      for (int64_t c = 0; c < kDim; ++c) sum += std::pow(double{before[head + c]}, 2);
      const double expected = before[at] / std::sqrt(sum / kDim + 1e-5) * weight[(i - 10) % kDim];
      REQUIRE(qkv[at] == Approx(expected).epsilon(1e-5).margin(1e-12));
    }
  }
}

TEST_CASE("SiluMul equals the double-precision formula up to extreme gates") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(3);
  for (const int64_t dim : {1, 15, 16, 17, 1536}) {
    for (const int64_t rows : {1, 40}) {
      CAPTURE(dim, rows);
      std::vector<float> gate = Normal(rows * dim, rng, 5);
      gate[0] = -200;
      if (dim > 3) {
        gate[1] = 200;
        gate[2] = 0;
        gate[3] = -95;
      }
      std::vector<float> up = Normal(rows * dim, rng);
      const std::vector<float> before = gate;
      SiluMulParams params;
      params.gate = params.out = Matrix(gate, rows, dim, dim);  // in place
      params.up = Matrix(up, rows, dim, dim);
      SiluMul(params, pool);
      for (int64_t i = 0; i < rows * dim; ++i) {
        REQUIRE(gate[i] == Approx(Silu(before[i]) * up[i]).epsilon(2e-6).margin(1e-30));
      }
    }
  }
}

TEST_CASE("a row's result does not depend on the other rows or on threads") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool one(1), three(3);
  constexpr int64_t kRows = 200, kDim = 577;
  std::vector<float> x = Normal(kRows * kDim, rng);
  std::vector<float> up = Normal(kRows * kDim, rng);
  const std::vector<float> weight = Normal(kDim, rng);
  std::vector<float> norm(x.size()), silu(x.size()), alone(kDim);
  RmsNormParams rms;
  rms.x = Matrix(x, kRows, kDim, kDim);
  rms.out = Matrix(norm, kRows, kDim, kDim);
  rms.weight = weight.data();
  RmsNorm(rms, three);
  SiluMulParams mul;
  mul.gate = rms.x;
  mul.up = Matrix(up, kRows, kDim, kDim);
  mul.out = Matrix(silu, kRows, kDim, kDim);
  SiluMul(mul, three);
  for (int64_t row = 0; row < kRows; ++row) {
    RmsNormParams rms_row = rms;
    rms_row.x = rms.x.Rows(row, 1);
    rms_row.out = Matrix(alone, 1, kDim, kDim);
    RmsNorm(rms_row, one);
    REQUIRE(std::memcmp(alone.data(), &norm[row * kDim], kDim * sizeof(float)) == 0);
    SiluMulParams mul_row = {mul.gate.Rows(row, 1), mul.up.Rows(row, 1), rms_row.out};
    SiluMul(mul_row, one);
    REQUIRE(std::memcmp(alone.data(), &silu[row * kDim], kDim * sizeof(float)) == 0);
  }
}

TEST_CASE("elementwise operations are right on every SIMD target") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(1);
  constexpr int64_t kDim = 83;
  std::vector<float> x = Normal(kDim, rng);
  std::vector<float> up = Normal(kDim, rng);
  std::vector<float> out(kDim);
  double sum = 0;
  for (const float value : x) sum += double{value} * value;
  ForEachSimdTarget([&] {
    RmsNorm({Matrix(x, 1, kDim, kDim), up.data(), 1e-6f, Matrix(out, 1, kDim, kDim)}, pool);
    for (int64_t i = 0; i < kDim; ++i) {
      const double expected = x[i] * up[i] / std::sqrt(sum / kDim + 1e-6);
      REQUIRE(out[i] == Approx(expected).epsilon(1e-5).margin(1e-12));
    }
    SiluMul({Matrix(x, 1, kDim, kDim), Matrix(up, 1, kDim, kDim), Matrix(out, 1, kDim, kDim)},
            pool);
    for (int64_t i = 0; i < kDim; ++i) {
      REQUIRE(out[i] == Approx(Silu(x[i]) * up[i]).epsilon(2e-6).margin(1e-12));
    }
  });
}

TEST_CASE("GatherRows copies the named rows") {
  std::mt19937 rng(kSeed);
  std::vector<float> x = Normal(6 * 10, rng);
  std::vector<float> out(4 * 7, 0.0f);
  const int32_t rows[] = {5, 0, 0, 3};
  GatherRowsParams params;
  params.x = Matrix(x, 6, 7, 10);
  params.row_indices = rows;
  params.out = Matrix(out, 4, 7, 7);
  GatherRows(params);
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 7; ++c) REQUIRE(out[i * 7 + c] == x[rows[i] * 10 + c]);
  }
}

}  // namespace gloam::cpu
