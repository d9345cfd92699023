#include "kernels/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/random_weight.h"

namespace gloam::cuda {
namespace {

// The largest of the test's activations with which every path must cope.
std::vector<uint16_t> RandomInputs(int64_t rows, int64_t cols, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) x[i] = normal(rng) * (i % 97 == 0 ? 30.0f : 1.0f);
  return RoundTo(DType::kBF16, x);
}

std::vector<float> RandomFloats(int64_t size, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(rng);
  return values;
}

std::unique_ptr<Weight> Load(GemmBackend& backend, std::vector<RawWeight> parts) {
  auto weight = backend.LoadWeight(parts);
  REQUIRE(weight.ok());
  return std::move(*weight);
}

TensorView View(void* data, DType dtype, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data, dtype, Device::kCuda, {rows, cols});
}

// The first `rows` rows of x times the weight, fp32.
std::vector<float> Multiply(GemmBackend& backend, const Weight& weight,
                            const DeviceArray<uint16_t>& x, int64_t rows) {
  DeviceArray<float> y(rows * weight.rows());
  GemmParams params;
  params.x = View(x.data(), DType::kBF16, rows, weight.cols());
  params.num_outputs = 1;
  params.outputs[0] = {&weight, nullptr, View(y.data(), DType::kF32, rows, weight.rows()), false};
  backend.Gemm(params);
  return y.Download();
}

float BF16Rounded(float value) {
  return ToFloat(DType::kBF16, RoundTo(DType::kBF16, {&value, 1}))[0];
}

// A weight, inputs and their product in double precision, with and without the weight rounded to
// bf16, and the sums of the magnitudes of what was added.
struct Reference {
  int64_t n;
  int64_t k;
  std::vector<double> exact;
  std::vector<double> rounded;
  std::vector<double> sizes;

  Reference(const RandomWeight& weight, const std::vector<uint16_t>& x_bits, int64_t rows)
      : n(weight.raw.rows),
        k(weight.raw.cols),
        exact(rows * n),
        rounded(rows * n),
        sizes(rows * n) {
    const std::vector<float> w = weight.Dequantized();
    const std::vector<float> terms = weight.TermSizes();
    const std::vector<float> w_rounded = ToFloat(DType::kBF16, RoundTo(DType::kBF16, w));
    const std::vector<float> x = ToFloat(DType::kBF16, x_bits);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0, sum_rounded = 0, size = 0;
        for (int64_t c = 0; c < k; ++c) {
          const double xc = x[row * k + c];
          sum += w[i * k + c] * xc;
          sum_rounded += w_rounded[i * k + c] * xc;
          size += terms[i * k + c] * std::fabs(xc);
        }
        exact[row * n + i] = sum;
        rounded[row * n + i] = sum_rounded;
        sizes[row * n + i] = size;
      }
    }
  }

  // The worst error of fp32 results in units of its bound: an fp32 sum of k terms is off by at most
  // as many roundings of 2^-24 of the magnitudes' sum; tensor cores cut instead of rounding, 16
  // terms at a time, and three more roundings scale a run.
  double WorstError(const std::vector<float>& y, bool weight_is_rounded) const {
    double worst = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double bound = (static_cast<double>(k) / 8 + 40) * 0x1p-23 * sizes[i];
      const double error = std::fabs(y[i] - (weight_is_rounded ? rounded : exact)[i]);
      worst = std::isfinite(y[i]) ? std::max(worst, error / bound) : 1e30;
    }
    return worst;
  }
};

struct Shape {
  int64_t n;
  int64_t k;
};

std::vector<Shape> ShapesOf(WeightType type) {
  if (InfoOf(type).block_elements == 256) {
    return Sized({Shape{5, 256}, Shape{50, 1536}, Shape{37, 8960}, Shape{6341, 256}},
                 {Shape{5, 256}, Shape{37, 2304}, Shape{530, 512}});
  }
  return Sized({Shape{5, 32}, Shape{16, 96}, Shape{301, 576}, Shape{50, 1536}, Shape{37, 8960},
                Shape{6341, 160}},
               {Shape{5, 32}, Shape{37, 2112}, Shape{530, 352}});
}

void CheckPrecision(const CudaOptions& options) {
  const CudaFixture fixture(options);
  const auto backend = MakeGemmBackend(fixture.context);
  for (WeightType type : kAllTypes) {
    for (const Shape& shape : ShapesOf(type)) {
      std::mt19937 rng(7 + static_cast<unsigned>(type));
      const RandomWeight matrix(type, shape.n, shape.k, rng);
      const auto weight = Load(*backend, {matrix.raw});
      CHECK(weight->rows() == shape.n);
      CHECK(weight->cols() == shape.k);
      CHECK(weight->type() == type);
      const int64_t most = shape.k > Sized(5000, 1000)  ? Sized(40, 9)
                           : shape.n > Sized(1000, 500) ? Sized(40, 70)
                                                        : Sized(512, 200);
      const std::vector<uint16_t> x_bits = RandomInputs(most, shape.k, rng);
      const DeviceArray<uint16_t> x(x_bits);
      const Reference reference(matrix, x_bits, most);
      for (int64_t rows : Sized({1, 2, 7, 8, 9, 16, 17, 24, 32, 33, 40, 70, 97, 130, 512},
                                {1, 8, 9, 17, 70, 200})) {
        if (rows > most) continue;
        CAPTURE(std::string(InfoOf(type).name), shape.n, shape.k, rows);
        const std::vector<float> y = Multiply(*backend, *weight, x, rows);
        const bool is_float = !IsQuantized(type);
        // Few rows: the file's weights, to fp32; many: dequantised to bf16.
        const double exact = reference.WorstError(y, is_float);
        CHECK(std::min(exact, rows > 64 ? reference.WorstError(y, true) : exact) <= 1);
      }
    }
  }
}

TEST_CASE("Products agree with double precision", "[gemm]") { CheckPrecision({}); }

TEST_CASE("Products of batch-invariant mode agree with double precision", "[gemm]") {
  CheckPrecision({.batch_invariant = true});
}

void CheckRowsAlone(WeightType type, const Shape& shape) {
  const CudaFixture fixture({.batch_invariant = true});
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(11);
  const RandomWeight matrix(type, shape.n, shape.k, rng);
  const auto weight = Load(*backend, {matrix.raw});
  const int64_t most = Sized(1100, IsQuantized(type) ? 140 : 270);
  const std::vector<uint16_t> bits = RandomInputs(most, shape.k, rng);
  const DeviceArray<uint16_t> x(bits);
  const std::vector<float> all = Multiply(*backend, *weight, x, most);
  CHECK(Reference(matrix, bits, 3)
            .WorstError({all.begin(), all.begin() + 3 * shape.n}, !IsQuantized(type)) <= 1);
  for (int64_t rows : Sized({1,  2,  7,  8,   9,   15,  16,  17,  31,  32,  33,  40,
                             64, 65, 96, 128, 129, 150, 192, 193, 256, 257, 300, 700},
                            {1, 8, 9, 17, 33, 65})) {
    CAPTURE(std::string(InfoOf(type).name), shape.n, shape.k, rows);
    const std::vector<float> y = Multiply(*backend, *weight, x, rows);
    CHECK(std::memcmp(y.data(), all.data(), y.size() * sizeof(float)) == 0);
  }
  // The last row alone, and among others.
  for (int64_t rows : Sized({1, 20, 65}, {1, 20})) {
    CAPTURE(std::string(InfoOf(type).name), shape.n, shape.k, rows);
    const std::vector<uint16_t> last(bits.end() - rows * shape.k, bits.end());
    const std::vector<float> y = Multiply(*backend, *weight, DeviceArray<uint16_t>(last), rows);
    CHECK(std::memcmp(y.data(), all.data() + (most - rows) * shape.n, y.size() * sizeof(float)) ==
          0);
  }
}

TEST_CASE("A row's result does not depend on the other rows", "[gemm]") {
  for (WeightType type : kAllTypes) {
    for (const Shape& shape : Sized({Shape{83, 1536}, Shape{6341, 512}, Shape{8197, 256}},
                                    {Shape{83, 256}, Shape{275, 256}})) {
      CheckRowsAlone(type, shape);
    }
  }
  // The shapes of models.
  CheckRowsAlone(WeightType::kBF16, {960, 576});
  CheckRowsAlone(WeightType::kBF16, {1030, Sized(14336, 2048)});
  CheckRowsAlone(WeightType::kQ4_0, {Sized(1024, 64), Sized(4096, 2304)});
}

// Three weights of `types` with bias, residual, strided x and y, against separate plain products.
void CheckEpilogues(const CudaFixture& fixture, const std::vector<WeightType>& types, DType y_dtype,
                    int64_t rows) {
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(13);
  const int64_t cols = Sized(512, 256), x_stride = cols + 16;
  constexpr int64_t kYStride = 160;
  constexpr int64_t kOutputs[] = {67, 16, 35};
  constexpr int64_t kFirst[] = {2, 70, 90};
  const std::vector<uint16_t> x = RandomInputs(rows, x_stride, rng);
  std::vector<uint16_t> dense;
  for (int64_t row = 0; row < rows; ++row) {
    const auto begin = x.begin() + row * x_stride + 8;
    dense.insert(dense.end(), begin, begin + cols);
  }
  const DeviceArray<uint16_t> wide_x(x), dense_x(dense);
  const std::vector<float> bias_values = RandomFloats(67, rng);
  const DeviceArray<float> bias(bias_values);
  std::vector<float> before = RandomFloats(rows * kYStride, rng);
  if (y_dtype == DType::kBF16) before = ToFloat(y_dtype, RoundTo(y_dtype, before));

  DeviceArray<float> y32(before);
  DeviceArray<uint16_t> y16(RoundTo(DType::kBF16, before));
  void* y = y_dtype == DType::kF32 ? static_cast<void*>(y32.data()) : y16.data();
  GemmParams params;
  params.x = View(wide_x.data(), DType::kBF16, rows, x_stride).Columns(8, cols);
  params.num_outputs = 3;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<float> expected = before;
  for (int i = 0; i < 3; ++i) {
    const RandomWeight matrix(types[i], kOutputs[i], cols, rng);
    weights.push_back(Load(*backend, {matrix.raw}));
    const std::vector<float> plain = Multiply(*backend, *weights[i], dense_x, rows);
    GemmOutput& output = params.outputs[i];
    output.weight = weights[i].get();
    output.y = View(y, y_dtype, rows, kYStride).Columns(kFirst[i], kOutputs[i]);
    output.bias = i == 1 ? nullptr : bias.data();
    output.accumulate = i != 2;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = 0; n < kOutputs[i]; ++n) {
        float& value = expected[row * kYStride + kFirst[i] + n];
        value = plain[row * kOutputs[i] + n] + (i == 1 ? 0 : bias_values[n]) +
                (output.accumulate ? value : 0);
      }
    }
  }
  backend->Gemm(params);
  const std::vector<float> actual =
      y_dtype == DType::kF32 ? y32.Download() : ToFloat(DType::kBF16, y16.Download());
  double worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    // fp32: the sums are of the same order, up to their own order; bf16: up to two roundings.
    const double bound = y_dtype == DType::kF32 ? 1e-3 : 0x1p-7 * std::fabs(expected[i]) + 2e-2;
    const double error = std::fabs(actual[i] - expected[i]);
    worst = std::isfinite(actual[i]) ? std::max(worst, error / bound) : 1e30;
  }
  CHECK(worst <= 1);
}

TEST_CASE("Bias, residual, strides and several outputs", "[gemm]") {
  const CudaFixture normal, invariant({.batch_invariant = true});
  using enum WeightType;
  for (const std::vector<WeightType>& types :
       {std::vector{kQ4_K, kQ8_0, kF32}, std::vector{kBF16, kF16, kBF16},
        std::vector{kQ6_K, kQ6_K, kQ6_K}, std::vector{kQ4_0, kBF16, kQ4_0}}) {
    for (DType y_dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t rows : Sized({1, 10, 40, 200}, {1, 10, 40})) {
        CAPTURE(std::string(InfoOf(types[0]).name), static_cast<int>(y_dtype), rows);
        CheckEpilogues(normal, types, y_dtype, rows);
      }
      for (int64_t rows : Sized({1, 10, 20, 40, 100, 200, 300}, {1, 10, 100})) {
        CAPTURE(std::string(InfoOf(types[0]).name), static_cast<int>(y_dtype), rows, "invariant");
        CheckEpilogues(invariant, types, y_dtype, rows);
      }
    }
  }
}

// e4m3 of every row, by plain code: 3 mantissa bits, exponents from 2^-6, subnormals below.
std::vector<float> FP8Rounded(const RandomWeight& matrix) {
  std::vector<float> w = matrix.Dequantized();
  for (int64_t row = 0; row < matrix.raw.rows; ++row) {
    float* values = w.data() + row * matrix.raw.cols;
    float largest = 0;
    for (int64_t i = 0; i < matrix.raw.cols; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float scale = largest > 0 ? largest / 448.0f : 1.0f;
    for (int64_t i = 0; i < matrix.raw.cols; ++i) {
      const float scaled = values[i] / scale;
      const int exponent = scaled == 0 ? -6 : std::max(std::ilogb(scaled), -6);
      const float step = std::ldexp(1.0f, exponent - 3);
      values[i] = std::nearbyint(scaled / step) * step * scale;
    }
  }
  return w;
}

TEST_CASE("fp8 weights", "[gemm]") {
  const CudaFixture fixture({.fp8_weights = true});
  const auto backend = MakeGemmBackend(fixture.context);
  for (WeightType type : {WeightType::kF32, WeightType::kF16, WeightType::kBF16}) {
    for (const Shape& shape :
         Sized({Shape{5, 32}, Shape{301, 576}, Shape{50, 1536}, Shape{6341, 160}},
               {Shape{5, 32}, Shape{50, 1536}, Shape{275, 160}})) {
      std::mt19937 rng(29);
      const RandomWeight matrix(type, shape.n, shape.k, rng);
      const auto weight = Load(*backend, {matrix.raw});
      CHECK(weight->type() == type);
      CHECK(weight->bytes() <= 4 * shape.n + (shape.n + 15) * (shape.k + 127));
      RandomWeight rounded = matrix;
      rounded.bytes.resize(shape.n * shape.k * 4);
      const std::vector<float> w = FP8Rounded(matrix);
      std::memcpy(rounded.bytes.data(), w.data(), rounded.bytes.size());
      rounded.raw = {rounded.bytes.data(), WeightType::kF32, shape.n, shape.k};
      constexpr int64_t kMost = 150;
      const std::vector<uint16_t> bits = RandomInputs(kMost, shape.k, rng);
      const DeviceArray<uint16_t> x(bits);
      const Reference reference(rounded, bits, kMost);
      for (int64_t rows : {1, 3, 8, 16, 20, 33, 150}) {
        CAPTURE(std::string(InfoOf(type).name), shape.n, shape.k, rows);
        CHECK(reference.WorstError(Multiply(*backend, *weight, x, rows), rows == kMost) <= 1);
      }
      const std::vector<int32_t> tokens = {0, 4, 3, static_cast<int32_t>(shape.n) - 1};
      const DeviceArray<int32_t> ids(tokens);
      DeviceArray<float> out(4 * shape.k);
      backend->Embed({weight.get(), ids.data(), View(out.data(), DType::kF32, 4, shape.k)});
      const std::vector<float> rows = out.Download();
      for (int i = 0; i < 4; ++i) {
        CHECK(std::equal(rows.begin() + i * shape.k, rows.begin() + (i + 1) * shape.k,
                         w.begin() + tokens[i] * shape.k));
      }
    }
  }
}

TEST_CASE("Stacked parts equal their separate products", "[gemm]") {
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(17);
  for (WeightType type : kAllTypes) {
    CAPTURE(std::string(InfoOf(type).name));
    const RandomWeight a(type, 21, 512, rng);
    const RandomWeight b(type, 7, 512, rng);
    const auto stacked = Load(*backend, {a.raw, b.raw, a.raw});
    CHECK(stacked->rows() == 49);
    const DeviceArray<uint16_t> x(RandomInputs(3, 512, rng));
    const std::vector<float> first = Multiply(*backend, *Load(*backend, {a.raw}), x, 3);
    const std::vector<float> second = Multiply(*backend, *Load(*backend, {b.raw}), x, 3);
    std::vector<float> expected;
    for (int row = 0; row < 3; ++row) {
      expected.insert(expected.end(), first.begin() + row * 21, first.begin() + (row + 1) * 21);
      expected.insert(expected.end(), second.begin() + row * 7, second.begin() + (row + 1) * 7);
      expected.insert(expected.end(), first.begin() + row * 21, first.begin() + (row + 1) * 21);
    }
    CHECK(Multiply(*backend, *stacked, x, 3) == expected);
  }
}

TEST_CASE("Weights keep about the size of the file", "[gemm]") {
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(19);
  for (WeightType type : kAllTypes) {
    if (!IsQuantized(type)) continue;
    CAPTURE(std::string(InfoOf(type).name));
    const RandomWeight matrix(type, 64, 1024, rng);
    const auto weight = Load(*backend, {matrix.raw});
    CHECK(weight->bytes() <= static_cast<int64_t>(matrix.bytes.size()) * 1.03);
  }
}

// Larger than the uploader's pieces, too.
TEST_CASE("Embed returns the rows that DequantizeRow returns", "[gemm]") {
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  std::mt19937 rng(23);
  for (WeightType type : kAllTypes) {
    CAPTURE(std::string(InfoOf(type).name));
    const int64_t cols = InfoOf(type).block_elements == 256 ? 512 : 576;
    const RandomWeight matrix(type, 4001, cols, rng);
    std::vector<RawWeight> parts(IsQuantized(type) ? 23 : 9, matrix.raw);
    const auto table = Load(*backend, parts);
    REQUIRE(table->rows() == 4001 * static_cast<int64_t>(parts.size()));
    std::vector<int32_t> tokens = {0, 4000, 4001, 15, 16, 31, 32, 7, 7};
    for (int i = 0; i < 40; ++i) tokens.push_back(static_cast<int32_t>(rng() % table->rows()));
    tokens.push_back(static_cast<int32_t>(table->rows() - 1));
    const auto num_tokens = static_cast<int64_t>(tokens.size());
    const DeviceArray<int32_t> ids(tokens);
    DeviceArray<float> out(num_tokens * (cols + 2));
    backend->Embed({table.get(), ids.data(),
                    View(out.data(), DType::kF32, num_tokens, cols + 2).Columns(0, cols)});
    const std::vector<float> actual = out.Download();
    std::vector<float> row(cols);
    for (int64_t i = 0; i < num_tokens; ++i) {
      DequantizeRow(matrix.raw, tokens[i] % 4001, row.data());
      if (!IsQuantized(type)) {
        for (float& value : row) value = BF16Rounded(value);
      }
      CAPTURE(tokens[i]);
      CHECK(std::equal(row.begin(), row.end(), actual.begin() + i * (cols + 2)));
      CHECK(std::isnan(actual[i * (cols + 2) + cols]));
    }
  }
}

}  // namespace
}  // namespace gloam::cuda
