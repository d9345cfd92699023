// RmsNorm, SiluMul and GatherRows on the GPU against double precision, and rows against themselves
// among others.
#include <cmath>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 11;

std::vector<float> Normal(int64_t size, std::mt19937& rng, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(size);
  for (float& value : values) value = normal(rng);
  return values;
}

TensorView Matrix(void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride) {
  TensorView view = TensorView::Contiguous(data, dtype, Device::kCuda, {rows, cols});
  view.strides[0] = stride;
  return view;
}

// Half the distance between bf16 numbers around x.
double HalfUlpBf16(double x) {
  return x == 0 ? 0 : std::ldexp(1.0, std::max(std::ilogb(x), -126) - 8);
}

// Number of `got` that are farther from `expected` than the output's rounding and `relative`.
int CountWrong(const std::vector<float>& got, const std::vector<double>& expected, bool bf16,
               double relative) {
  int wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double tolerance =
        relative * std::abs(expected[i]) + (bf16 ? HalfUlpBf16(expected[i]) : 0) + 1e-36;
    if (!(std::abs(got[i] - expected[i]) <= tolerance)) ++wrong;
  }
  return wrong;
}

// fp32 or bf16 output with a stride; what lies between rows must stay as it was.
struct Output {
  Output(DType dtype, int64_t rows, int64_t cols, int64_t stride)
      : dtype(dtype), cols(cols), stride(stride), bytes(rows * stride * DTypeBytes(dtype)) {
    view = Matrix(bytes.data(), dtype, rows, cols, stride);
  }

  // The elements inside rows; fails if anything was written outside.
  std::vector<float> Download() const {
    const std::vector<uint8_t> raw = bytes.Download();
    const size_t element_bytes = DTypeBytes(dtype);
    std::vector<float> values;
    int written_outside = 0;
    for (size_t i = 0; i < raw.size() / element_bytes; ++i) {
      const bool inside = static_cast<int64_t>(i) % stride < cols;
      const uint8_t* at = raw.data() + i * element_bytes;
      if (!inside) {
        for (size_t b = 0; b < element_bytes; ++b) written_outside += at[b] != 0xFF ? 1 : 0;
      } else if (dtype == DType::kF32) {
        float value;
        std::memcpy(&value, at, sizeof(value));
        values.push_back(value);
      } else {
        uint16_t bits;
        std::memcpy(&bits, at, sizeof(bits));
        values.push_back(ToFloat(dtype, std::span(&bits, 1))[0]);
      }
    }
    REQUIRE(written_outside == 0);
    return values;
  }

  DType dtype;
  int64_t cols;
  int64_t stride;
  DeviceArray<uint8_t> bytes;
  TensorView view;
};

std::vector<double> RmsNormReference(const float* x, const std::vector<float>& weight, float eps) {
  double sum = 0;
  for (size_t i = 0; i < weight.size(); ++i) sum += double{x[i]} * x[i];
  const double scale = 1 / std::sqrt(sum / static_cast<double>(weight.size()) + double{eps});
  std::vector<double> out(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) out[i] = x[i] * scale * weight[i];
  return out;
}

}  // namespace

TEST_CASE("RmsNorm equals the double-precision formula: lengths, strides, output types") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  for (const int64_t dim : {1,    5,    64,   80,   96,   128,  256,  260,   576,   577,  896,
                            1536, 2048, 3584, 4096, 4098, 5120, 8192, 14336, 16384, 20000}) {
    for (const int64_t rows : {1, 3, 70}) {
      for (const int64_t padding : {0, 4, 7}) {
        for (const DType dtype : {DType::kBF16, DType::kF32}) {
          CAPTURE(dim, rows, padding, dtype);
          const int64_t stride = dim + padding;
          const std::vector<float> x = Normal(rows * stride, rng, 3);
          const std::vector<float> weight = Normal(dim, rng);
          const DeviceArray<float> device_x(x), device_weight(weight);
          const Output out(dtype, rows, dim, dim + 2 * padding);
          RmsNorm({.x = Matrix(device_x.data(), DType::kF32, rows, dim, stride),
                   .weight = device_weight.data(),
                   .eps = 1e-5f,
                   .out = out.view},
                  fixture.context);
          std::vector<double> expected;
          for (int64_t row = 0; row < rows; ++row) {
            const auto one = RmsNormReference(&x[row * stride], weight, 1e-5f);
            expected.insert(expected.end(), one.begin(), one.end());
          }
          REQUIRE(CountWrong(out.Download(), expected, dtype == DType::kBF16, 1e-6) == 0);
        }
      }
    }
  }
}

TEST_CASE("RmsNorm of heads works in place inside a fused matrix") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  for (const int64_t dim : {64, 72, 80, 96, 128, 192, 256}) {
    for (const int64_t tokens : {1, 5, 130}) {
      for (const int64_t offset : {0, 8, 3}) {
        constexpr int64_t kHeads = 7;
        CAPTURE(dim, tokens, offset);
        const int64_t width = offset + kHeads * dim + 20;
        const std::vector<float> before = Normal(tokens * width, rng, 0.1f);
        const std::vector<float> weight = Normal(dim, rng);
        const DeviceArray<float> qkv(before), device_weight(weight);
        TensorView heads = TensorView::Contiguous(qkv.data() + offset, DType::kF32, Device::kCuda,
                                                  {tokens, kHeads, dim});
        heads.strides[0] = width;
        RmsNorm({.x = heads, .weight = device_weight.data(), .eps = 1e-6f, .out = heads},
                fixture.context);
        const std::vector<float> after = qkv.Download();
        std::vector<double> expected(before.begin(), before.end());
        for (int64_t token = 0; token < tokens; ++token) {
          for (int64_t head = 0; head < kHeads; ++head) {
            const int64_t at = token * width + offset + head * dim;
            const auto one = RmsNormReference(&before[at], weight, 1e-6f);
            std::copy(one.begin(), one.end(), expected.begin() + at);
          }
        }
        REQUIRE(CountWrong(after, expected, false, 1e-6) == 0);
      }
    }
  }
}

TEST_CASE("SiluMul equals the double-precision formula up to extreme gates") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  for (const int64_t dim : {1, 8, 15, 576, 1000, 1536, 4864, 14336}) {
    for (const int64_t tokens : {1, 3, 65}) {
      for (const int64_t padding : {0, 8, 5}) {
        CAPTURE(dim, tokens, padding);
        const int64_t stride = 2 * dim + padding;  // gate and up side by side
        std::vector<float> values = Normal(tokens * stride, rng, 4);
        const float extremes[] = {-200, 200, 0, -95, -87, 88, 1e30f, -1e30f};
        for (int64_t i = 0; i < std::min<int64_t>(dim, 8); ++i) values[i] = extremes[i];
        const std::vector<uint16_t> bits = RoundTo(DType::kBF16, values);
        values = ToFloat(DType::kBF16, bits);
        std::vector<double> expected;
        for (int64_t token = 0; token < tokens; ++token) {
          for (int64_t i = 0; i < dim; ++i) {
            const double gate = values[token * stride + i];
            const double up = values[token * stride + dim + i];
            expected.push_back(gate / (1 + std::exp(-gate)) * up);
            if (std::abs(expected.back()) < 1e-34) expected.back() = 0;
          }
        }
        for (const bool in_place : {false, true}) {
          const DeviceArray<uint16_t> x(bits);
          const Output out(DType::kBF16, tokens, dim, dim + padding);
          SiluMulParams params;
          params.gate = Matrix(x.data(), DType::kBF16, tokens, dim, stride);
          params.up = Matrix(x.data() + dim, DType::kBF16, tokens, dim, stride);
          params.out = in_place ? params.gate : out.view;
          SiluMul(params, fixture.context);
          std::vector<float> got;
          if (in_place) {
            const std::vector<float> all = ToFloat(DType::kBF16, x.Download());
            int changed = 0;
            for (size_t i = 0; i < all.size(); ++i) {
              if (static_cast<int64_t>(i) % stride < dim) {
                got.push_back(all[i]);
              } else {
                changed += all[i] != values[i] ? 1 : 0;
              }
            }
            REQUIRE(changed == 0);
          } else {
            got = out.Download();
          }
          for (float& value : got) value = std::abs(value) < 1e-34f ? 0 : value;
          REQUIRE(CountWrong(got, expected, true, 2e-5) == 0);
        }
      }
    }
  }
}

TEST_CASE("a row's bits do not depend on the other rows") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  for (const int64_t dim : {128, 577, 4096}) {
    constexpr int64_t kRows = 300;
    const DeviceArray<float> x(Normal(kRows * dim, rng)), weight(Normal(dim, rng));
    const DeviceArray<float> together(kRows * dim), alone(kRows * dim);
    RmsNormParams params;
    params.x = Matrix(x.data(), DType::kF32, kRows, dim, dim);
    params.weight = weight.data();
    params.out = Matrix(together.data(), DType::kF32, kRows, dim, dim);
    RmsNorm(params, fixture.context);
    for (int64_t row = 0; row < kRows; ++row) {
      RmsNormParams one = params;
      one.x = params.x.Rows(row, 1);
      one.out = Matrix(alone.data() + row * dim, DType::kF32, 1, dim, dim);
      RmsNorm(one, fixture.context);
    }
    REQUIRE(together.Download() == alone.Download());
  }
}

void CheckGatherRows(DType dtype, int64_t dim, int64_t padding, int64_t num_rows, std::mt19937& rng,
                     const DeviceContext& context) {
  CAPTURE(dtype, dim, padding, num_rows);
  constexpr int64_t kTokens = 33;
  const int64_t stride = dim + padding;
  std::vector<float> x = Normal(kTokens * stride, rng);
  const std::vector<uint16_t> bits = RoundTo(DType::kBF16, x);
  if (dtype == DType::kBF16) x = ToFloat(DType::kBF16, bits);
  std::vector<int32_t> rows(num_rows);
  for (int32_t& row : rows) row = static_cast<int32_t>(rng() % kTokens);
  const DeviceArray<float> device_x(x);
  const DeviceArray<uint16_t> device_bits(bits);
  void* data = device_x.data();
  if (dtype == DType::kBF16) data = device_bits.data();
  const DeviceArray<int32_t> device_rows(rows);
  const Output out(dtype, num_rows, dim, stride);
  GatherRows({.x = Matrix(data, dtype, kTokens, dim, stride),
              .row_indices = device_rows.data(),
              .out = out.view},
             context);
  std::vector<float> expected;
  for (const int32_t row : rows) {
    expected.insert(expected.end(), &x[row * stride], &x[row * stride] + dim);
  }
  REQUIRE(out.Download() == expected);
}

TEST_CASE("GatherRows copies the named rows") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture fixture;
  for (const int64_t num_rows : {1, 9, 200}) {
    for (const int64_t dim : {1, 7, 576, 4096, 5000}) {
      for (const int64_t padding : {0, 3, 4}) {
        CheckGatherRows(DType::kF32, dim, padding, num_rows, rng, fixture.context);
      }
    }
    for (const int64_t dim : {2, 6, 576, 4096, 5002}) {  // rows are whole words of four bytes
      for (const int64_t padding : {0, 2, 8}) {
        CheckGatherRows(DType::kBF16, dim, padding, num_rows, rng, fixture.context);
      }
    }
  }
}

}  // namespace gloam::cuda
