// Greedy logits against the product they stand for: the tokens that Sample finds in the candidates
// are those that it finds in all logits.
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/random_weight.h"

namespace gloam::cuda {
namespace {

TensorView View(void* data, DType dtype, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data, dtype, Device::kCuda, {rows, cols});
}

// A vocabulary whose tokens come several times each, far from one another.
class Vocabulary {
 public:
  Vocabulary(int64_t size, int64_t hidden_size, const CudaFixture& fixture)
      : size_(size),
        hidden_size_(hidden_size),
        rng_(47),
        matrix_(WeightType::kBF16, size, hidden_size, rng_),
        gemm_(MakeGemmBackend(fixture.context)),
        sample_(MakeSampleBackend(fixture.context)) {
    const size_t row_bytes = matrix_.bytes.size() / size;
    const int64_t num_distinct = size / 3 - 1;
    for (int64_t row = num_distinct; row < size; ++row) {
      std::memcpy(&matrix_.bytes[row * row_bytes], &matrix_.bytes[row % num_distinct * row_bytes],
                  row_bytes);
    }
    auto weight = gemm_->LoadWeight({&matrix_.raw, 1});
    REQUIRE(weight.ok());
    weight_ = std::move(*weight);
  }

  // Rows of x; the last has a NaN, where there are several.
  std::vector<uint16_t> RandomRows(int64_t num_rows) {
    std::normal_distribution<float> normal;
    std::vector<float> x(num_rows * hidden_size_);
    for (float& element : x) element = normal(rng_);
    if (num_rows > 1) x.back() = std::numeric_limits<float>::quiet_NaN();
    return RoundTo(DType::kBF16, x);
  }

  // Nothing where there are no greedy logits.
  std::vector<int32_t> GreedyTokens(const DeviceArray<uint16_t>& x, int64_t num_rows) {
    const DeviceArray<float> y(num_rows * size_);
    const auto candidates =
        gemm_->GreedyLogits({.x = ViewOf(x, num_rows),
                             .weight = weight_.get(),
                             .y = View(y.data(), DType::kF32, num_rows, size_)});
    if (!candidates) return {};
    REQUIRE(candidates->values.shape[0] == num_rows);
    REQUIRE(2 * candidates->values.shape[1] <= size_);
    return Sample(*candidates, num_rows);
  }

  std::vector<int32_t> TokensOfAllLogits(const DeviceArray<uint16_t>& x, int64_t num_rows) {
    const DeviceArray<float> y(num_rows * size_);
    GemmParams params = {.x = ViewOf(x, num_rows), .num_outputs = 1};
    params.outputs[0] = {.weight = weight_.get(),
                         .y = View(y.data(), DType::kF32, num_rows, size_)};
    gemm_->Gemm(params);
    return Sample({params.outputs[0].y}, num_rows);
  }

 private:
  TensorView ViewOf(const DeviceArray<uint16_t>& x, int64_t num_rows) const {
    return View(x.data(), DType::kBF16, num_rows, hidden_size_);
  }

  std::vector<int32_t> Sample(const LogitRows& logits, int64_t num_rows) {
    const std::vector<SampleRow> rows(num_rows, {.temperature = 0});
    std::vector<SampleResult> results(num_rows);
    sample_->Sample({.logits = logits, .rows = rows, .results = results});
    sample_->FinishSample();
    std::vector<int32_t> tokens;
    for (const SampleResult& result : results) tokens.push_back(result.token);
    return tokens;
  }

  const int64_t size_, hidden_size_;
  std::mt19937 rng_;
  RandomWeight matrix_;
  const std::unique_ptr<GemmBackend> gemm_;
  const std::unique_ptr<SampleBackend> sample_;
  std::unique_ptr<Weight> weight_;
};

TEST_CASE("Greedy logits have the tokens of all logits", "[gemm]") {
  // The same sums in both products, so that equal logits are equal in both.
  const CudaFixture fixture({.batch_invariant = true});
  if (fixture.context.compute_capability != 90) return;
  struct Shape {
    int64_t vocab_size;
    int64_t hidden_size;
  };
  for (const Shape& shape :
       Sized({Shape{10240, 576}, Shape{32000, 128}, Shape{49153, 64}, Shape{128256, 256}},
             {Shape{10240, 64}, Shape{10247, 96}})) {
    Vocabulary vocabulary(shape.vocab_size, shape.hidden_size, fixture);
    for (const int64_t num_rows :
         Sized({1, 8, 9, 16, 31, 64, 65, 128, 129, 192, 193, 256}, {1, 8, 17, 40, 100, 129, 200})) {
      CAPTURE(shape.vocab_size, shape.hidden_size, num_rows);
      const DeviceArray<uint16_t> x(vocabulary.RandomRows(num_rows));
      const std::vector<int32_t> tokens = vocabulary.GreedyTokens(x, num_rows);
      REQUIRE(tokens.size() == static_cast<size_t>(num_rows));
      CHECK(tokens == vocabulary.TokensOfAllLogits(x, num_rows));
      if (num_rows > 1) CHECK(tokens.back() == 0);
    }
  }
}

TEST_CASE("Greedy logits are left to the product where that is as fast", "[gemm]") {
  const CudaFixture fixture;
  Vocabulary vocabulary(32000, 128, fixture);
  for (const int64_t num_rows : {1, 8, 64, 256, 257}) {
    CAPTURE(num_rows);
    const DeviceArray<uint16_t> x(vocabulary.RandomRows(num_rows));
    CHECK(vocabulary.GreedyTokens(x, num_rows).empty());
  }
}

}  // namespace
}  // namespace gloam::cuda
