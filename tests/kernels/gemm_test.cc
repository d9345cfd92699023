#include "kernels/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "hwy/targets.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/vnni.h"
#include "kernels/quant_block.h"
#include "tests/kernels/random_weight.h"

namespace gloam::cpu {
namespace {

std::unique_ptr<Weight> Pack(std::initializer_list<RawWeight> parts, ThreadPool& pool) {
  auto packed = PackWeight(std::span(parts.begin(), parts.size()), pool);
  REQUIRE(packed.ok());
  return std::move(*packed);
}

// Activations with a few large channels, as in real models, and one block of zeros.
std::vector<float> RandomActivations(int64_t rows, int64_t cols, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    x[i] = normal(rng) * (i % 97 == 0 ? 30.0f : 1.0f);
    if (i % cols / 32 == 3) x[i] = 0;
  }
  return x;
}

TensorView View(std::vector<float>& data, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data.data(), DType::kF32, Device::kCpu, {rows, cols});
}

std::vector<float> Multiply(const Weight& weight, std::vector<float> x, int64_t rows,
                            CpuActivations activations, ThreadPool& pool, bool precise = false) {
  Scratch scratch;
  std::vector<float> y(rows * weight.rows(), NAN);
  GemmParams params;
  params.x = View(x, rows, weight.cols());
  params.num_outputs = 1;
  params.precise = precise;
  params.outputs[0] = {&weight, nullptr, View(y, rows, weight.rows()), false};
  Gemm(params, activations, pool, scratch);
  return y;
}

// Rounds the blocks of x to int8 by plain code and takes that from x.
std::vector<double> TakeRounded(std::vector<float>& x) {
  std::vector<double> rounded(x.size());
  for (size_t block = 0; block < x.size(); block += 32) {
    float largest = 0;
    for (size_t i = block; i < block + 32; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (size_t i = block; i < block + 32; ++i) {
      const float value = largest / 127.0f * std::nearbyint(x[i] * inverse);
      rounded[i] = double{value};
      x[i] -= value;
    }
  }
  return rounded;
}

// Activations as the int8 mode sees them: with `precise` also what rounding left out, rounded.
std::vector<double> RoundedActivations(std::vector<float> x, bool precise) {
  std::vector<double> rounded = TakeRounded(x);
  if (!precise) return rounded;
  const std::vector<double> rest = TakeRounded(x);
  for (size_t i = 0; i < rounded.size(); ++i) rounded[i] += rest[i];
  return rounded;
}

// Of a block's largest activation: half a step of rounding.
double HalfStep(bool precise) { return precise ? 1.0 / (254 * 254) : 1.0 / 254; }

// Checks the product against double precision.
//   fp32 rounding: at most 3 roundings per step of the sum, each 2^-24 of a partial sum that is
//     bounded by the magnitudes' sum A: |error| <= 3 * steps * 2^-24 * A.
//   int8 activations: an activation moves by at most half a step, so besides the above |y - W x| <=
//     sum |w_k| * largest(block of k) * HalfStep (1% more for x * (127 / largest) rounding across a
//     tie).
void CheckAgainstDouble(const RandomWeight& matrix, const std::vector<float>& x,
                        CpuActivations activations, bool precise = false) {
  const WeightType type = matrix.raw.type;
  const int64_t num_outputs = matrix.raw.rows;
  const int64_t cols = matrix.raw.cols;
  const int64_t rows = static_cast<int64_t>(x.size()) / cols;
  ThreadPool pool(2);
  const auto weight = Pack({matrix.raw}, pool);
  const std::vector<float> y = Multiply(*weight, x, rows, activations, pool, precise);

  const bool int8 = activations == CpuActivations::kInt8 && IsQuantized(type);
  const std::vector<double> seen =
      int8 ? RoundedActivations(x, precise) : std::vector<double>(x.begin(), x.end());
  const std::vector<float> w = matrix.Dequantized();
  const std::vector<float> sizes = matrix.TermSizes();
  const int64_t steps = int8 ? cols / 16 + 2 : cols;
  double worst = 0;  // error in units of its bound
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < num_outputs; ++n) {
      const float* wn = w.data() + n * cols;
      const float* xr = x.data() + row * cols;
      const double* sr = seen.data() + row * cols;
      double exact = 0;
      double exact_seen = 0;
      double step_error = 0;
      double magnitude = 0;
      for (int64_t k = 0; k < cols; ++k) {
        exact += double{wn[k]} * xr[k];
        exact_seen += double{wn[k]} * sr[k];
        magnitude += double{sizes[n * cols + k]} * std::fabs(sr[k]);
        if (!int8) continue;
        float largest = 0;
        for (int64_t i = k / 32 * 32; i < k / 32 * 32 + 32; ++i) {
          largest = std::max(largest, std::fabs(xr[i]));
        }
        step_error += std::fabs(wn[k]) * largest * HalfStep(precise) * 1.01;
      }
      const double rounding = 3.0 * steps * 0x1p-24 * magnitude;
      const double actual = y[row * num_outputs + n];
      worst = std::max(worst, std::fabs(actual - exact_seen) / rounding);
      worst = std::max(worst, std::fabs(actual - exact) / (rounding + step_error));
    }
  }
  CHECK(worst <= 1.0);
}

constexpr int64_t kNumOutputs = 37;  // two panels and a bit

void CheckAgainstDouble(WeightType type, int64_t rows, CpuActivations activations,
                        bool precise = false) {
  std::mt19937 rng(7 + static_cast<unsigned>(type));
  const int64_t cols = RaggedCols(type);
  const RandomWeight matrix(type, kNumOutputs, cols, rng);
  CheckAgainstDouble(matrix, RandomActivations(rows, cols, rng), activations, precise);
}

// Every quant at one end of its range, and every activation at one of its own: no sum of products
// may leave the integers that hold it.
void CheckExtremes(WeightType type, int64_t rows) {
  std::mt19937 rng(29);
  const int64_t cols = RaggedCols(type);
  std::vector<float> x(rows * cols);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i / 64 % 3 == 1 ? -1.0f : 1.0f;
  for (const uint32_t or_mask : {0x00u, 0xffu, 0x80u}) {
    const RandomWeight matrix(type, kNumOutputs, cols, rng, 0, or_mask);
    for (const bool precise : {false, true}) {
      CheckAgainstDouble(matrix, x, CpuActivations::kInt8, precise);
    }
  }
}

TEST_CASE("Products agree with double precision") {
  for (WeightType type : kAllTypes) {
    for (CpuActivations activations : {CpuActivations::kInt8, CpuActivations::kF32}) {
      for (int64_t rows : {1, 13}) {
        CAPTURE(std::string(InfoOf(type).name), static_cast<int>(activations), rows);
        CheckAgainstDouble(type, rows, activations);
      }
    }
  }
}

TEST_CASE("Every instruction set agrees with double precision") {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    for (bool without_vnni : {false, true}) {
      hwy::GetChosenTarget().Update(target);
      DisableVnniForTest(without_vnni);
      for (WeightType type : kAllTypes) {
        for (CpuActivations activations : {CpuActivations::kInt8, CpuActivations::kF32}) {
          CAPTURE(hwy::TargetName(target), without_vnni, std::string(InfoOf(type).name));
          CheckAgainstDouble(type, 9, activations);
        }
        if (!IsQuantized(type)) continue;
        for (const int64_t rows : {1, 9}) {
          CheckExtremes(type, rows);
          CheckAgainstDouble(type, rows, CpuActivations::kInt8, /*precise=*/true);
        }
      }
    }
  }
  DisableVnniForTest(false);
  hwy::GetChosenTarget().DeInit();
}

TEST_CASE("A row's result does not depend on the other rows or on the threads") {
  constexpr int64_t kMaxRows = 300;
  for (WeightType type : kAllTypes) {
    std::mt19937 rng(11);
    const int64_t cols = RaggedCols(type);
    const RandomWeight matrix(type, 83, cols, rng);
    std::vector<float> x = RandomActivations(kMaxRows, cols, rng);
    struct Mode {
      CpuActivations activations;
      bool precise;
    };
    for (const auto& [activations, precise] :
         {Mode{CpuActivations::kInt8, false}, Mode{CpuActivations::kInt8, true},
          Mode{CpuActivations::kF32, false}}) {
      std::vector<float> expected;  // row by row
      for (int num_threads : {1, 2, 3}) {
        ThreadPool pool(num_threads);
        const auto weight = Pack({matrix.raw}, pool);
        if (expected.empty()) {
          for (int64_t row = 0; row < kMaxRows; ++row) {
            const std::vector<float> one(x.begin() + row * cols, x.begin() + (row + 1) * cols);
            const std::vector<float> y = Multiply(*weight, one, 1, activations, pool, precise);
            expected.insert(expected.end(), y.begin(), y.end());
          }
        }
        for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 100, 300}) {
          const std::vector<float> some(x.begin(), x.begin() + rows * cols);
          const std::vector<float> y = Multiply(*weight, some, rows, activations, pool, precise);
          CAPTURE(std::string(InfoOf(type).name), static_cast<int>(activations), precise,
                  num_threads, rows);
          CHECK(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("Bias, residual, strides and several outputs") {
  std::mt19937 rng(13);
  const int64_t rows = 10;
  const int64_t cols = 512;
  ThreadPool pool(2);
  // Different types beside each other: Q and K quantised, V in fp32.
  const RandomWeight matrices[] = {RandomWeight(WeightType::kQ4_K, 40, cols, rng),
                                   RandomWeight(WeightType::kQ8_0, 16, cols, rng),
                                   RandomWeight(WeightType::kF32, 5, cols, rng)};
  const std::vector<float> x = RandomActivations(rows, cols, rng);
  const std::vector<float> bias = RandomActivations(1, 40, rng);

  // x and y are columns of wider matrices; what lies beside them must stay.
  const int64_t x_stride = cols + 3;
  const int64_t y_stride = 70;
  std::vector<float> wide_x(rows * x_stride, NAN);
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(x.data() + row * cols, cols, wide_x.data() + row * x_stride + 2);
  }
  const std::vector<float> before = RandomActivations(rows, y_stride, rng);
  std::vector<float> wide_y = before;
  GemmParams params;
  params.x = View(wide_x, rows, x_stride).Columns(2, cols);
  params.num_outputs = 3;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<std::vector<float>> plain;
  const int64_t first_col[] = {1, 44, 62};
  for (int i = 0; i < 3; ++i) {
    weights.push_back(Pack({matrices[i].raw}, pool));
    plain.push_back(Multiply(*weights[i], x, rows, CpuActivations::kInt8, pool));
    GemmOutput& output = params.outputs[i];
    output.weight = weights[i].get();
    output.y = View(wide_y, rows, y_stride).Columns(first_col[i], weights[i]->rows());
    output.bias = i == 1 ? nullptr : bias.data();
    output.accumulate = i != 2;
  }
  Scratch scratch;
  Gemm(params, CpuActivations::kInt8, pool, scratch);

  std::vector<float> expected = before;
  for (int i = 0; i < 3; ++i) {
    const int64_t num_outputs = weights[i]->rows();
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = 0; n < num_outputs; ++n) {
        float value = plain[i][row * num_outputs + n];
        if (params.outputs[i].bias != nullptr) value += bias[n];
        float& y = expected[row * y_stride + first_col[i] + n];
        y = params.outputs[i].accumulate ? y + value : value;
      }
    }
  }
  CHECK(wide_y == expected);
}

TEST_CASE("Stacked parts equal their separate products") {
  std::mt19937 rng(17);
  ThreadPool pool(2);
  for (WeightType type : kAllTypes) {
    CAPTURE(std::string(InfoOf(type).name));
    const int64_t cols = RaggedCols(type);
    const RandomWeight a(type, 21, cols, rng);
    const RandomWeight b(type, 7, cols, rng);
    const auto stacked = Pack({a.raw, b.raw, a.raw}, pool);
    CHECK(stacked->type() == type);
    CHECK(stacked->rows() == 49);
    CHECK(stacked->cols() == cols);
    const std::vector<float> x = RandomActivations(1, cols, rng);
    std::vector<float> expected = Multiply(*Pack({a.raw}, pool), x, 1, CpuActivations::kInt8, pool);
    const std::vector<float> first = expected;
    const auto second = Multiply(*Pack({b.raw}, pool), x, 1, CpuActivations::kInt8, pool);
    expected.insert(expected.end(), second.begin(), second.end());
    expected.insert(expected.end(), first.begin(), first.end());
    CHECK(Multiply(*stacked, x, 1, CpuActivations::kInt8, pool) == expected);
  }
}

// The tokens of greedy rows.
std::vector<int32_t> GreedyTokens(const LogitRows& logits, ThreadPool& pool) {
  const auto num_rows = static_cast<size_t>(logits.values.shape[0]);
  const std::vector<SampleRow> rows(num_rows, {.temperature = 0});
  std::vector<SampleResult> results(num_rows);
  Sample({.logits = logits, .rows = rows, .results = results}, pool);
  std::vector<int32_t> tokens;
  for (const SampleResult& result : results) tokens.push_back(result.token);
  return tokens;
}

TEST_CASE("Greedy logits have the tokens of all logits") {
  constexpr int64_t kVocabSize = 1003;
  std::mt19937 rng(31);
  for (WeightType type : {WeightType::kQ8_0, WeightType::kQ4_K, WeightType::kBF16}) {
    const int64_t cols = RaggedCols(type);
    // Tokens that come several times, far from one another.
    RandomWeight matrix(type, kVocabSize, cols, rng);
    const int64_t row_bytes = RowBytes(type, cols);
    for (int64_t row = 400; row < kVocabSize; ++row) {
      std::copy_n(&matrix.bytes[row % 400 * row_bytes], row_bytes, &matrix.bytes[row * row_bytes]);
    }
    for (int num_threads : {1, 2, 3}) {
      ThreadPool pool(num_threads);
      const auto weight = Pack({matrix.raw}, pool);
      for (int64_t rows : {1, 4, 5, 32, 150}) {
        CAPTURE(std::string(InfoOf(type).name), num_threads, rows);
        std::vector<float> x = RandomActivations(rows, cols, rng);
        // All logits are equal; in fp32 the last row has none.
        std::fill_n(x.begin(), cols, 0.0f);
        if (type == WeightType::kBF16 && rows > 1) x.back() = NAN;
        for (CpuActivations activations : {CpuActivations::kInt8, CpuActivations::kF32}) {
          std::vector<float> y(rows * kVocabSize);
          Scratch scratch;
          const auto candidates = GreedyLogits(
              {.x = View(x, rows, cols), .weight = weight.get(), .y = View(y, rows, kVocabSize)},
              activations, pool, scratch);
          REQUIRE(candidates);
          CHECK(candidates->values.shape[1] < 10);
          const std::vector<int32_t> tokens = GreedyTokens(*candidates, pool);
          std::vector<float> all = Multiply(*weight, x, rows, activations, pool);
          CHECK(tokens == GreedyTokens({View(all, rows, kVocabSize)}, pool));
          CHECK(tokens.front() == 0);
        }
      }
    }
  }
}

TEST_CASE("Packed weights keep the precision and about the size of the file") {
  std::mt19937 rng(19);
  ThreadPool pool(1);
  for (WeightType type : kAllTypes) {
    CAPTURE(std::string(InfoOf(type).name));
    const RandomWeight matrix(type, 64, 1024, rng);
    const auto weight = Pack({matrix.raw}, pool);
    // K-quants' 6-bit sub-scales become bytes.
    CHECK(weight->bytes() <= static_cast<int64_t>(matrix.bytes.size()) * 1.12 + 64);
  }
}

TEST_CASE("Embed returns the rows that DequantizeRow returns") {
  std::mt19937 rng(23);
  ThreadPool pool(2);
  for (WeightType type : kAllTypes) {
    CAPTURE(std::string(InfoOf(type).name));
    const int64_t cols = RaggedCols(type);
    const RandomWeight matrix(type, 50, cols, rng);
    const auto table = Pack({matrix.raw}, pool);
    std::vector<int32_t> tokens = {0, 49, 15, 16, 17, 31, 32, 7, 7, 48, 1};
    const auto num_tokens = static_cast<int64_t>(tokens.size());
    std::vector<float> out(num_tokens * (cols + 1), -1);
    Embed({table.get(), tokens.data(), View(out, num_tokens, cols + 1).Columns(0, cols)}, pool);
    std::vector<float> row(cols);
    for (int64_t i = 0; i < num_tokens; ++i) {
      DequantizeRow(matrix.raw, tokens[i], row.data());
      const float* actual = out.data() + i * (cols + 1);
      CHECK(std::equal(row.begin(), row.end(), actual));
      CHECK(actual[cols] == -1);
    }
  }
}

}  // namespace
}  // namespace gloam::cpu
