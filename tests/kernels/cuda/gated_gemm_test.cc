// The gated product in one kernel against double precision, and which products it leaves to others.
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
  int64_t m;
  int64_t n;
  int64_t k;
};

std::unique_ptr<Weight> Load(GemmBackend& backend, const RawWeight& raw) {
  auto weight = backend.LoadWeight({&raw, 1});
  REQUIRE(weight.ok());
  return std::move(*weight);
}

TensorView View(void* data, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data, DType::kBF16, Device::kCuda, {rows, cols});
}

double Silu(double x) { return x / (1 + std::exp(-x)); }

// x and y are columns of wider matrices, as in a step; what lies beside y keeps its bits.
void CheckShape(const Shape& shape, GemmBackend& backend) {
  CAPTURE(shape.m, shape.n, shape.k);
  std::mt19937 rng(31);
  const RandomWeight matrix(WeightType::kBF16, 2 * shape.n, shape.k, rng);
  const auto weight = Load(backend, matrix.raw);
  const int64_t x_stride = shape.k + 16, y_stride = 2 * shape.n + 8;
  std::vector<float> values(shape.m * x_stride);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < values.size(); ++i) values[i] = normal(rng) * (i % 97 == 0 ? 30.0f : 1.0f);
  const std::vector<uint16_t> x_bits = RoundTo(DType::kBF16, values);
  const DeviceArray<uint16_t> x(x_bits), y(shape.m * y_stride);
  REQUIRE(backend.GatedGemm({.x = View(x.data(), shape.m, x_stride).Columns(8, shape.k),
                             .weight = weight.get(),
                             .y = View(y.data(), shape.m, y_stride).Columns(8, shape.n)}));
  const std::vector<uint16_t> y_bits = y.Download();
  const std::vector<float> w = matrix.Dequantized();
  const std::vector<float> x_values = ToFloat(DType::kBF16, x_bits);
  const std::vector<float> actual = ToFloat(DType::kBF16, y_bits);

  double worst = 0;
  for (int64_t row = 0; row < shape.m; ++row) {
    for (int64_t i = 0; i < y_stride; ++i) {
      if (i < 8 || i >= 8 + shape.n) REQUIRE(y_bits[row * y_stride + i] == 0xFFFF);
    }
    // Rows of every tile's edges, and a few columns of every warp's.
    if (row % 64 > 1 && row % 64 < 63 && row + 3 < shape.m) continue;
    const float* x_row = &x_values[row * x_stride + 8];
    for (int64_t i = row % 5; i < shape.n; i += 5) {
      double sums[2] = {}, sizes[2] = {};
      for (const int part : {0, 1}) {
        const float* w_row = &w[(part * shape.n + i) * shape.k];
        for (int64_t c = 0; c < shape.k; ++c) {
          sums[part] += double{x_row[c]} * double{w_row[c]};
          sizes[part] += std::fabs(double{x_row[c]} * double{w_row[c]});
        }
      }
      // Sums as in gemm_test.cc; silu's slope is at most 1.1; a few roundings in fp32, one to bf16.
      const double unit = (static_cast<double>(shape.k) / 8 + 40) * 0x1p-23;
      const double expected = Silu(sums[0]) * sums[1];
      const double bound =
          unit * (1.1 * sizes[0] * std::fabs(sums[1]) + std::fabs(Silu(sums[0])) * sizes[1] +
                  sizes[0] * sizes[1] * unit) +
          (0x1p-8 + 0x1p-18) * std::fabs(expected) + 0x1p-120;
      const float value = actual[row * y_stride + 8 + i];
      const double error = std::fabs(double{value} - expected);
      worst = std::isfinite(value) ? std::max(worst, error / bound) : 1e30;
    }
  }
  CHECK(worst <= 1);
}

bool HasKernel(const CudaFixture& fixture) { return fixture.context.compute_capability == 90; }

TEST_CASE("Gated products agree with double precision") {
  const CudaFixture fixture;
  if (!HasKernel(fixture)) return;
  const auto backend = MakeGemmBackend(fixture.context);
  for (const Shape& shape :
       Sized({Shape{1024, 128, 64}, Shape{1025, 256, 192}, Shape{1500, 384, 576},
              Shape{2049, 128, 1024}, Shape{1100, 4864, 896}, Shape{4500, 1536, 576}},
             {Shape{1024, 128, 64}, Shape{1025, 256, 192}, Shape{1500, 384, 576}})) {
    CheckShape(shape, *backend);
  }
  // A decode batch's.
  for (const Shape& shape :
       Sized({Shape{17, 8456, 512}, Shape{32, 8960, 480}, Shape{33, 14336, 320},
              Shape{50, 1000, 4256}, Shape{64, 8960, 1536}, Shape{65, 8392, 608},
              Shape{128, 8960, 1536}, Shape{129, 8456, 576}, Shape{256, 18944, 320}},
             {Shape{17, 1000, 4256}, Shape{50, 1000, 4256}, Shape{65, 2008, 2112},
              Shape{129, 2008, 2112}})) {
    CheckShape(shape, *backend);
  }
}

TEST_CASE("Batch-invariant gated products: precision, and a row's bits among any others") {
  const CudaFixture fixture({.batch_invariant = true});
  if (!HasKernel(fixture)) return;
  const auto backend = MakeGemmBackend(fixture.context);
  for (const Shape& shape :
       Sized({Shape{1, 1536, 576}, Shape{7, 128, 96}, Shape{16, 4864, 896}, Shape{17, 8456, 96},
              Shape{40, 1000, 224}, Shape{64, 8960, 1536}, Shape{100, 1536, 576},
              Shape{300, 1536, 576}, Shape{1500, 384, 576}},
             {Shape{1, 1536, 576}, Shape{7, 128, 96}, Shape{17, 1000, 96}, Shape{40, 1000, 224},
              Shape{100, 128, 576}, Shape{300, 384, 192}})) {
    CheckShape(shape, *backend);
  }
  constexpr int64_t kMost = 1100, kN = 1544, kK = 1024;
  std::mt19937 rng(41);
  const RandomWeight matrix(WeightType::kBF16, 2 * kN, kK, rng);
  const auto weight = Load(*backend, matrix.raw);
  std::vector<float> values(kMost * kK);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(rng);
  const DeviceArray<uint16_t> x(RoundTo(DType::kBF16, values));
  const auto multiply = [&](int64_t rows) {
    const DeviceArray<uint16_t> y(rows * kN);
    REQUIRE(backend->GatedGemm(
        {.x = View(x.data(), rows, kK), .weight = weight.get(), .y = View(y.data(), rows, kN)}));
    return y.Download();
  };
  const std::vector<uint16_t> all = multiply(kMost);
  for (int64_t rows : {1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 150, 256, 257, 300}) {
    CAPTURE(rows);
    const std::vector<uint16_t> some = multiply(rows);
    CHECK(std::equal(some.begin(), some.end(), all.begin()));
  }
}

TEST_CASE("Few rows, odd shapes and other types go another way") {
  const CudaFixture fixture, invariant({.batch_invariant = true});
  std::mt19937 rng(37);
  const DeviceArray<uint16_t> x(1100 * 256), y(256 * 8512);  // as large as any below
  const auto takes = [&](const CudaFixture& on, WeightType type, const Shape& shape) {
    const auto backend = MakeGemmBackend(on.context);
    const RandomWeight matrix(type, 2 * shape.n, shape.k, rng);
    const auto weight = Load(*backend, matrix.raw);
    const bool taken = backend->GatedGemm({.x = View(x.data(), shape.m, shape.k),
                                           .weight = weight.get(),
                                           .y = View(y.data(), shape.m, shape.n)});
    on.Synchronize();
    return taken;
  };
  CHECK(takes(fixture, WeightType::kBF16, {1100, 128, 256}) == HasKernel(fixture));
  CHECK(takes(fixture, WeightType::kBF16, {256, 8512, 512}) == HasKernel(fixture));
  CHECK(!takes(fixture, WeightType::kBF16, {257, 8512, 512}));
  CHECK(!takes(fixture, WeightType::kBF16, {17, 8512, 96}));
  CHECK(takes(fixture, WeightType::kBF16, {16, 8512, 512}) == HasKernel(fixture));
  CHECK(!takes(fixture, WeightType::kBF16, {7, 8512, 512}));
  CHECK(!takes(fixture, WeightType::kBF16, {17, 8508, 512}));
  CHECK(takes(invariant, WeightType::kBF16, {16, 128, 256}) == HasKernel(fixture));
  CHECK(!takes(invariant, WeightType::kBF16, {17, 8508, 96}));
  CHECK(!takes(fixture, WeightType::kBF16, {16, 128, 256}));
  CHECK(!takes(fixture, WeightType::kBF16, {1100, 96, 256}));
  CHECK(!takes(fixture, WeightType::kBF16, {1100, 128, 96}));
  CHECK(!takes(fixture, WeightType::kQ8_0, {1100, 128, 256}));
  CHECK(!takes(invariant, WeightType::kQ8_0, {1100, 128, 256}));
}

}  // namespace
}  // namespace gloam::cuda
