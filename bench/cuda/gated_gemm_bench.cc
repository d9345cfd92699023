// The feed-forward network's first product with its activation, for Llama-3.1-8B: microseconds in
// one kernel, and as a product and SiluMul. In turns, because a GPU at its power limit slows down.
//
//   gated_gemm_bench         one JSON object per line and number of rows
#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr int64_t kHidden = 4096, kIntermediate = 14336;

// Normal numbers, a megabyte of them over and over.
std::vector<uint16_t> Normal(int64_t size, float scale) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> part(1 << 19);
  for (float& value : part) value = normal(rng);
  const std::vector<uint16_t> bits = RoundTo(DType::kBF16, part);
  std::vector<uint16_t> all(size);
  for (int64_t i = 0; i < size; ++i) all[i] = bits[i % (1 << 19)];
  return all;
}

double Microseconds(const CudaFixture& fixture, const std::function<void()>& op) {
  constexpr int kRuns = 6;
  const Event begin(cudaEventDefault), end(cudaEventDefault);
  op();
  GLOAM_CUDA_CHECK(cudaEventRecord(begin.get(), fixture.context.stream));
  for (int i = 0; i < kRuns; ++i) op();
  GLOAM_CUDA_CHECK(cudaEventRecord(end.get(), fixture.context.stream));
  GLOAM_CUDA_CHECK(cudaEventSynchronize(end.get()));
  float ms = 0;
  GLOAM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
  return 1e3 * static_cast<double>(ms) / kRuns;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

TensorView View(void* data, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(data, DType::kBF16, Device::kCuda, {rows, cols});
}

int Main() {
  constexpr int64_t kMostRows = 8192;
  const CudaFixture fixture;
  const auto backend = MakeGemmBackend(fixture.context);
  const std::vector<uint16_t> host = Normal(2 * kIntermediate * kHidden, 0.02f);
  const RawWeight raw = {reinterpret_cast<const std::byte*>(host.data()), WeightType::kBF16,
                         2 * kIntermediate, kHidden};
  const std::unique_ptr<Weight> weight = backend->LoadWeight({&raw, 1}).value();
  const DeviceArray<uint16_t> x(Normal(kMostRows * kHidden, 1)), y(kMostRows * 2 * kIntermediate);
  for (const int64_t rows : {256, 512, 768, 1024, 2048, 4096, 8192}) {
    const TensorView input = View(x.data(), rows, kHidden);
    const TensorView gate_up = View(y.data(), rows, 2 * kIntermediate);
    const TensorView gate = gate_up.Columns(0, kIntermediate);
    const TensorView up = gate_up.Columns(kIntermediate, kIntermediate);
    std::vector<double> together, apart;
    bool has_kernel = true;
    for (int i = 0; i < 5 && has_kernel; ++i) {
      together.push_back(Microseconds(fixture, [&] {
        has_kernel = backend->GatedGemm({.x = input, .weight = weight.get(), .y = gate});
      }));
      apart.push_back(Microseconds(fixture, [&] {
        GemmParams product = {.x = input, .num_outputs = 1};
        product.outputs[0] = {.weight = weight.get(), .y = gate_up};
        backend->Gemm(product);
        SiluMul({.gate = gate, .up = up, .out = gate}, fixture.context);
      }));
    }
    if (!has_kernel) continue;
    const double us = Median(together);
    const double flops = 4.0 * static_cast<double>(rows * kIntermediate * kHidden);
    fmt::print(R"({{"rows": {}, "us": {:.1f}, "teraflops": {:.0f}, "apart_us": {:.1f}}})"
               "\n",
               rows, us, flops / us / 1e6, Median(apart));
  }
  return 0;
}

}  // namespace
}  // namespace gloam::cuda

int main() { return gloam::cuda::Main(); }
