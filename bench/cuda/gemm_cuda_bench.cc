// Times the CUDA backend's matrix products beside cuBLASLt's, in one run: single shapes of
// Llama-3.1-8B and the chain of one of its layers, over more distinct weights than L2 holds, as
// CUDA graphs. Prints JSON.
//
//   gemm_cuda_bench [--batch-invariant] [type] [rows ...]    defaults: BF16, 1 4 8 16 32 64
//
// Of quantised types "cublas" is the product with the dequantised bf16 weight, dequantising not
// counted. "of_read_rate": bytes of the weights over the time, beside what a plain kernel reads.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gemm/cublas_lt.h"
#include "kernels/quant_block.h"

namespace gloam::cuda {
namespace {

constexpr int kLayers = 6;  // of the chain; 436 MB each in bf16
constexpr int kRepeats = 12;

struct Product {
  const char* name;
  int64_t n;
  int64_t k;
};
constexpr Product kProducts[] = {
    {"qkv", 6144, 4096},   {"o", 4096, 4096},         {"gate_up", 28672, 4096},
    {"down", 4096, 14336}, {"lm_head", 128256, 4096},  // not of the chain
};
constexpr size_t kGateUp = 2;  // with its activation
constexpr size_t kHead = 4;

// Rows of a file's bytes without NaN, repeated to any height.
class Source {
 public:
  Source(WeightType type, int64_t k) : type_(type), k_(k), bytes_(kRows * RowBytes(type, k)) {
    std::mt19937 rng(5);
    for (std::byte& byte : bytes_) byte = static_cast<std::byte>(rng() & 0x3b);
  }
  std::vector<RawWeight> Parts(int64_t rows) const {
    std::vector<RawWeight> parts;
    for (int64_t row = 0; row < rows; row += kRows) {
      parts.push_back({bytes_.data(), type_, std::min(kRows, rows - row), k_});
    }
    return parts;
  }

 private:
  static constexpr int64_t kRows = 512;
  WeightType type_;
  int64_t k_;
  std::vector<std::byte> bytes_;
};

// Median milliseconds of a graph that holds what `enqueue` enqueues.
double TimeGraph(cudaStream_t stream, const std::function<void()>& enqueue) {
  enqueue();  // loads kernels, picks algorithms
  GLOAM_CUDA_CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph = nullptr;
  GLOAM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  GLOAM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  GLOAM_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> times;
  Event begin(cudaEventDefault), end(cudaEventDefault);
  for (int i = 0; i < kRepeats + 2; ++i) {
    GLOAM_CUDA_CHECK(cudaEventRecord(begin.get(), stream));
    GLOAM_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    GLOAM_CUDA_CHECK(cudaEventRecord(end.get(), stream));
    GLOAM_CUDA_CHECK(cudaEventSynchronize(end.get()));
    float ms = 0;
    GLOAM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    if (i >= 2) times.push_back(ms);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

class Bench {
 public:
  Bench(const DeviceContext& context, WeightType type)
      : context_(context),
        type_(type),
        backend_(MakeGemmBackend(context)),
        cublas_(CublasLt::Load().value()),
        workspace_(AllocateDevice(CublasLt::kWorkspaceBytes).value()),
        x_(AllocateDevice(kMaxRows * 14336 * 2).value()),
        y_(AllocateDevice(kMaxRows * 128256 * 4).value()),
        plain_(AllocateDevice(kPlainBytes).value()),
        read_rate_(MeasureReadRate(context)) {
    const auto start = std::chrono::steady_clock::now();
    for (const Product& product : kProducts) {
      const Source source(type, product.k);
      for (int layer = 0; layer < kLayers; ++layer) {
        auto weight = backend_->LoadWeight(source.Parts(product.n));
        loaded_bytes_ += product.n * RowBytes(type, product.k);
        weights_.push_back(std::move(weight).value());
      }
    }
    GLOAM_CUDA_CHECK(cudaStreamSynchronize(context.stream));
    load_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void Run(const std::vector<int64_t>& rows) {
    fmt::print(
        "{{\"type\": \"{}\", \"read_gb_per_s\": {:.0f}, \"load_gb_per_s\": {:.1f}, \"results\": "
        "[\n",
        InfoOf(type_).name, read_rate_ / 1e9, loaded_bytes_ / load_seconds_ / 1e9);
    const char* separator = "";
    for (int64_t m : rows) {
      for (size_t i = 0; i < std::size(kProducts); ++i) {
        fmt::print("{}{}", separator, Row(kProducts[i].name, m, {i}));
        separator = ",\n";
      }
      fmt::print("{}{}", separator, Row("layer", m, {0, 1, 2, 3}));
      std::fflush(stdout);
    }
    fmt::print("\n]}}\n");
  }

  static constexpr int64_t kMaxRows = 8192;

 private:
  static constexpr size_t kPlainBytes = size_t{128256} * 4096 * 2;  // more than two layers

  const Weight& WeightOf(size_t product, int layer) const {
    return *weights_[product * kLayers + layer];
  }

  std::string Row(const char* name, int64_t m, const std::vector<size_t>& products) {
    int64_t bytes = 0;
    for (size_t i : products) bytes += WeightOf(i, 0).bytes();
    const double ours = TimeGraph(context_.stream, [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        for (size_t i : products) Ours(i, layer, m);
      }
    });
    const double theirs = TimeGraph(context_.stream, [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        for (size_t i : products) Theirs(i, layer, m);
      }
    });
    const double us = ours / kLayers * 1e3;
    return fmt::format(
        "{{\"shape\": \"{}\", \"m\": {}, \"us\": {:.2f}, \"gb_per_s\": {:.0f}, \"of_read_rate\": "
        "{:.3f}, \"cublas_us\": {:.2f}}}",
        name, m, us, bytes / us / 1e3, bytes / us * 1e6 / read_rate_, theirs / kLayers * 1e3);
  }

  void Ours(size_t product, int layer, int64_t m) {
    const Product& p = kProducts[product];
    GemmParams params;
    params.x = TensorView::Contiguous(x_.data(), DType::kBF16, Device::kCuda, {m, p.k});
    params.num_outputs = 1;
    const bool is_gate_up = product == kGateUp;
    if (is_gate_up) {
      const TensorView y = TensorView::Contiguous(y_.data(), DType::kBF16, Device::kCuda, {m, p.n});
      if (backend_->GatedGemm(
              {.x = params.x, .weight = &WeightOf(product, layer), .y = y.Columns(0, p.n / 2)})) {
        return;
      }
    }
    params.outputs[0] = {&WeightOf(product, layer), nullptr,
                         TensorView::Contiguous(y_.data(), is_gate_up ? DType::kBF16 : DType::kF32,
                                                Device::kCuda, {m, p.n}),
                         product % 2 == 1};
    backend_->Gemm(params);
    if (is_gate_up) Activate(m);
  }

  void Activate(int64_t m) {
    const int64_t n = kProducts[kGateUp].n;
    const TensorView y = TensorView::Contiguous(y_.data(), DType::kBF16, Device::kCuda, {m, n});
    const TensorView gate = y.Columns(0, n / 2);
    SiluMul({.gate = gate, .up = y.Columns(n / 2, n / 2), .out = gate}, context_);
  }

  // Layers take turns at two places.
  void Theirs(size_t product, int layer, int64_t m) {
    const Product& p = kProducts[product];
    size_t offset = 0;
    if (product != kHead) {
      size_t layer_bytes = 0;
      for (size_t i = 0; i < kHead; ++i) {
        if (i == product) offset = layer_bytes;
        layer_bytes += static_cast<size_t>(kProducts[i].n * kProducts[i].k) * 2;
      }
      if (layer % 2 == 1) offset += layer_bytes;
    }
    cublas_->Multiply({.x = x_.data(),
                       .x_stride = p.k,
                       .w = static_cast<char*>(plain_.data()) + offset,
                       .y = y_.data(),
                       .y_stride = p.n,
                       .m = m,
                       .n = p.n,
                       .k = p.k,
                       .y_is_bf16 = product == kGateUp,
                       .accumulate = product % 2 == 1},
                      workspace_.data(), context_.stream);
    if (product == kGateUp) Activate(m);
  }

  const DeviceContext context_;
  const WeightType type_;
  std::unique_ptr<GemmBackend> backend_;
  std::unique_ptr<CublasLt> cublas_;
  Buffer workspace_;
  Buffer x_;
  Buffer y_;
  Buffer plain_;
  double read_rate_;
  std::vector<std::unique_ptr<Weight>> weights_;  // [products][kLayers]
  double loaded_bytes_ = 0;
  double load_seconds_ = 0;
};

int Main(int argc, char** argv) {
  WeightType type = WeightType::kBF16;
  const bool batch_invariant = argc > 1 && std::string(argv[1]) == "--batch-invariant";
  if (batch_invariant) {
    --argc;
    ++argv;
  }
  std::vector<int64_t> rows;
  if (argc > 1) {
    for (int i = 0; i <= static_cast<int>(WeightType::kQ6_K); ++i) {
      if (InfoOf(static_cast<WeightType>(i)).name == argv[1]) type = static_cast<WeightType>(i);
    }
  }
  for (int i = 2; i < argc; ++i) rows.push_back(std::atol(argv[i]));
  if (rows.empty()) rows = {1, 4, 8, 16, 32, 64};
  for (int64_t m : rows) {
    if (m < 1 || m > Bench::kMaxRows) {
      fmt::print(stderr, "rows must be 1..{}\n", Bench::kMaxRows);
      return 2;
    }
  }
  cudaDeviceProp properties{};
  GLOAM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  const Stream stream;
  Bench({.options = {.batch_invariant = batch_invariant},
         .stream = stream.get(),
         .num_sms = properties.multiProcessorCount,
         .compute_capability = 10 * properties.major + properties.minor,
         .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
         .l2_bytes = properties.l2CacheSize},
        type)
      .Run(rows);
  return 0;
}

}  // namespace
}  // namespace gloam::cuda

int main(int argc, char** argv) { return gloam::cuda::Main(argc, argv); }
