// Products of a decode batch, bf16 weights, against double precision: every number of rows' tiles,
// whole and split sums, both types of y, with what may be added to them.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/random_weight.h"

namespace gloam::cuda {
namespace {

struct Shape {
  int64_t n;
  int64_t k;
};

struct Variant {
  DType y_dtype;
  bool has_bias;
  bool accumulate;
};

TensorView View(void* data, DType dtype, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data, dtype, Device::kCuda, {rows, cols});
}

std::vector<float> RandomFloats(int64_t size, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (size_t i = 0; i < values.size(); ++i) values[i] = normal(rng) * (i % 97 == 0 ? 30.0f : 1.0f);
  return values;
}

// A weight and inputs; x and y are columns of wider matrices, as in a step.
class Case {
 public:
  static constexpr int64_t kMargin = 8;  // columns before x and y; after y, too

  Case(const Shape& shape, int64_t max_rows, GemmBackend& backend)
      : shape_(shape),
        backend_(backend),
        rng_(41),
        matrix_(WeightType::kBF16, shape.n, shape.k, rng_) {
    auto weight = backend.LoadWeight({&matrix_.raw, 1});
    REQUIRE(weight.ok());
    weight_ = std::move(*weight);
    w_ = matrix_.Dequantized();
    const std::vector<uint16_t> bits =
        RoundTo(DType::kBF16, RandomFloats(max_rows * x_stride(), rng_));
    x_ = ToFloat(DType::kBF16, bits);
    device_x_ = std::make_unique<DeviceArray<uint16_t>>(bits);
    bias_ = RandomFloats(shape.n, rng_);
    before_ =
        ToFloat(DType::kBF16, RoundTo(DType::kBF16, RandomFloats(max_rows * y_stride(), rng_)));
  }

  void Check(int64_t rows, const Variant& variant) {
    CAPTURE(shape_.n, shape_.k, rows, variant.y_dtype, variant.has_bias, variant.accumulate);
    const std::vector<float> y = Run(rows, variant);
    double worst = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const float* y_row = &y[row * y_stride()];
      const float* before = &before_[row * y_stride()];
      REQUIRE(std::equal(y_row, y_row + kMargin, before));
      REQUIRE(
          std::equal(y_row + kMargin + shape_.n, y_row + y_stride(), before + kMargin + shape_.n));
      // Rows of every tile's edges; some columns of each, all of them in the end.
      if (row % 64 > 2 && row % 64 < 62 && row + 3 < rows) continue;
      for (int64_t i = row % 7; i < shape_.n; i += 7) {
        const double first =
            (variant.has_bias ? bias_[i] : 0.0) + (variant.accumulate ? before[kMargin + i] : 0.0);
        const double error = Error(row, i, y_row[kMargin + i], first, variant.y_dtype);
        worst = std::isfinite(error) ? std::max(worst, error) : 1e30;
      }
    }
    CHECK(worst <= 1);
  }

 private:
  int64_t x_stride() const { return shape_.k + 2 * kMargin; }
  int64_t y_stride() const { return shape_.n + 2 * kMargin; }

  std::vector<float> Run(int64_t rows, const Variant& variant) {
    const std::vector<float> before(before_.begin(), before_.begin() + rows * y_stride());
    const DeviceArray<float> y32(before), bias(bias_);
    const DeviceArray<uint16_t> y16(RoundTo(DType::kBF16, before));
    const bool is_bf16 = variant.y_dtype == DType::kBF16;
    void* y = is_bf16 ? static_cast<void*>(y16.data()) : y32.data();
    GemmParams params;
    params.x = View(device_x_->data(), DType::kBF16, rows, x_stride()).Columns(kMargin, shape_.k);
    params.num_outputs = 1;
    params.outputs[0] = {weight_.get(), variant.has_bias ? bias.data() : nullptr,
                         View(y, variant.y_dtype, rows, y_stride()).Columns(kMargin, shape_.n),
                         variant.accumulate};
    backend_.Gemm(params);
    return is_bf16 ? ToFloat(DType::kBF16, y16.Download()) : y32.Download();
  }

  // In units of its bound: sums as in gemm_test.cc; a few roundings in fp32, two to bf16.
  double Error(int64_t row, int64_t i, float value, double first, DType y_dtype) const {
    double sum = first, size = std::fabs(first);
    for (int64_t c = 0; c < shape_.k; ++c) {
      const double term = double{x_[row * x_stride() + kMargin + c]} * double{w_[i * shape_.k + c]};
      sum += term;
      size += std::fabs(term);
    }
    double bound = (static_cast<double>(shape_.k) / 8 + 40) * 0x1p-23 * size;
    if (y_dtype == DType::kBF16)
      bound += 0x1p-8 * (std::fabs(sum) + std::fabs(sum - first) + std::fabs(first)) + 1e-30;
    return std::fabs(double{value} - sum) / bound;
  }

  const Shape shape_;
  GemmBackend& backend_;
  std::mt19937 rng_;
  RandomWeight matrix_;
  std::unique_ptr<Weight> weight_;
  std::vector<float> w_, x_, bias_, before_;
  std::unique_ptr<DeviceArray<uint16_t>> device_x_;
};

TEST_CASE("Products of a decode batch agree with double precision", "[gemm]") {
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  // Tiles of many heights, several for a thread block in the end; edges of tiles and of 64
  // channels; y's rows of 16-byte pieces, of pairs and of neither; what is left to cuBLASLt.
  for (const Shape& shape :
       Sized({Shape{4096, 2112}, Shape{3976, 4096}, Shape{2050, 4128}, Shape{6144, 1376},
              Shape{6007, 1440}, Shape{67592, 128}, Shape{67722, 160}, Shape{200, 96},
              Shape{17160, 512}, Shape{1032, 8224}},
             {Shape{1032, 8224}, Shape{5127, 1664}, Shape{200, 96}})) {
    Case product(shape, 200, *backend);
    for (int64_t rows : Sized({8, 17, 24, 32, 33, 40, 55, 64, 65, 200}, {8, 17, 64, 65})) {
      product.Check(rows, {DType::kF32, false, true});
      product.Check(rows, {DType::kBF16, false, false});
      if (rows % 2 == 1) product.Check(rows, {DType::kF32, true, false});
      if (rows % 8 == 0) product.Check(rows, {DType::kBF16, true, false});
      if (rows == 40 || rows == 64) product.Check(rows, {DType::kF32, true, true});
    }
  }
}

TEST_CASE("The same product twice has the same bits", "[gemm]") {
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(43);
  const RandomWeight matrix(WeightType::kBF16, 4096, 2112, rng);
  auto weight = backend->LoadWeight({&matrix.raw, 1});
  REQUIRE(weight.ok());
  const DeviceArray<uint16_t> x(RoundTo(DType::kBF16, RandomFloats(256 * 2112, rng)));
  for (int64_t rows : Sized({24, 64, 256}, {24, 64})) {
    std::vector<float> first;
    for (int i = 0; i < Sized(20, 3); ++i) {
      const DeviceArray<float> y(std::vector<float>(rows * 4096, 0.5f));
      GemmParams params;
      params.x = View(x.data(), DType::kBF16, rows, 2112);
      params.num_outputs = 1;
      params.outputs[0] = {weight->get(), nullptr, View(y.data(), DType::kF32, rows, 4096), true};
      backend->Gemm(params);
      const std::vector<float> result = y.Download();
      if (first.empty()) first = result;
      CHECK(result == first);
    }
  }
}

}  // namespace
}  // namespace gloam::cuda
