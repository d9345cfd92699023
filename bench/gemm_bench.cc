// Times the CPU backend's matrix products on the shapes of SmolLM2-135M (Q4_1, vocabulary Q8_0),
// beside the rate at which this machine reads memory.
//
//   gemm_bench [threads] [type] [rows]
//     threads: 0 (default) uses all; type: Q4_1 (default), Q4_K, ...; rows: up to 512, one count
//     instead of 1, 8, 32 and 512
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kNumLayers = 30;
constexpr int kRepeats = 7;

struct Product {
  const char* name;
  int64_t n;
  int64_t k;
  std::vector<std::unique_ptr<Weight>> layers;  // distinct, so that no cache holds them all
};

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The least of several runs: the machine may be shared.
template <typename F>
double BestSeconds(const F& f) {
  double best = 1e30;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = Clock::now();
    f();
    best = std::min(best, SecondsSince(start));
  }
  return best;
}

double MeasuredReadRate(int num_threads) {
  constexpr int64_t kWords = int64_t{32} << 20;  // 256 MiB
  constexpr int64_t kPieces = 256;
  std::vector<uint64_t> data(kWords, 1);
  std::vector<uint64_t> sums(kPieces);
  cpu::ThreadPool pool(num_threads);
  const double seconds = BestSeconds([&] {
    pool.ParallelFor(kPieces, [&](int64_t piece, int) {
      const uint64_t* p = data.data() + piece * (kWords / kPieces);
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < kWords / kPieces; i += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
      }
      sums[piece] = std::accumulate(sum, sum + 8, uint64_t{0});
    });
  });
  if (std::accumulate(sums.begin(), sums.end(), uint64_t{0}) != kWords) std::abort();
  return kWords * 8.0 / seconds;
}

// Random bytes, with every fp16 of a block's head small and positive.
std::unique_ptr<Weight> RandomWeight(Ops& ops, WeightType type, int64_t n, int64_t k,
                                     std::mt19937_64& rng) {
  std::vector<std::byte> bytes(n * RowBytes(type, k));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng());
  const size_t block_bytes = InfoOf(type).block_bytes;
  const size_t scale_at = type == WeightType::kQ6_K ? 208 : 0;
  const uint16_t small[2] = {0x1400, 0x1400};
  const size_t scale_bytes = block_bytes >= 4 && scale_at == 0 ? 4 : 2;
  for (size_t at = 0; at < bytes.size(); at += block_bytes) {
    std::memcpy(&bytes[at + scale_at], small, scale_bytes);
  }
  const RawWeight raw = {bytes.data(), type, n, k};
  return std::move(*ops.LoadWeight({&raw, 1}));
}

void Multiply(Ops& ops, const Weight& weight, int64_t m, std::vector<float>& x,
              std::vector<float>& y) {
  GemmParams params;
  params.x = TensorView::Contiguous(x.data(), DType::kF32, Device::kCpu, {m, weight.cols()});
  params.num_outputs = 1;
  params.outputs[0].weight = &weight;
  params.outputs[0].y =
      TensorView::Contiguous(y.data(), DType::kF32, Device::kCpu, {m, weight.rows()});
  ops.Gemm(params);
}

void PrintRow(const char* name, int64_t m, double seconds, double bytes, double operations) {
  fmt::print("{:<22} {:>4} {:>10.1f} {:>8.1f} {:>8.1f}\n", name, m, seconds * 1e6,
             bytes / seconds * 1e-9, operations / seconds * 1e-9);
}

int Main(int num_threads, WeightType type, const std::vector<int64_t>& rows) {
  const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = num_threads});
  std::mt19937_64 rng(1);
  std::vector<Product> products;
  products.push_back({"qkv 960x576", 960, 576, {}});
  products.push_back({"o 576x576", 576, 576, {}});
  products.push_back({"gate+up 3072x576", 3072, 576, {}});
  products.push_back({"down 576x1536", 576, 1536, {}});
  if (InfoOf(type).block_elements == 256) {
    for (Product& product : products) product.k = product.k == 576 ? 512 : product.k;
  }
  for (Product& product : products) {
    for (int layer = 0; layer < kNumLayers; ++layer) {
      product.layers.push_back(RandomWeight(*ops, type, product.n, product.k, rng));
    }
  }
  const auto vocabulary = RandomWeight(*ops, WeightType::kQ8_0, 49152, 576, rng);

  const double read_rate = MeasuredReadRate(num_threads > 0 ? num_threads : 2);
  fmt::print("memory read rate {:.1f} GB/s\n", read_rate * 1e-9);
  fmt::print("{:<22} {:>4} {:>10} {:>8} {:>8}\n", InfoOf(type).name, "rows", "us", "GB/s", "GOP/s");
  std::vector<float> x(512 * 1536);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(rng);
  std::vector<float> y(int64_t{512} * 49152);
  for (const int64_t m : rows) {
    double layers_bytes = 0;
    double layers_operations = 0;
    for (const Product& product : products) {
      const double bytes = product.layers[0]->bytes();
      const double operations = 2.0 * m * product.n * product.k;
      const double seconds = BestSeconds([&] {
        for (const auto& weight : product.layers) Multiply(*ops, *weight, m, x, y);
      });
      PrintRow(product.name, m, seconds / kNumLayers, bytes, operations);
      layers_bytes += bytes * kNumLayers;
      layers_operations += operations * kNumLayers;
    }
    const auto layers = [&] {
      for (int layer = 0; layer < kNumLayers; ++layer) {
        for (const Product& product : products) {
          Multiply(*ops, *product.layers[layer], m, x, y);
        }
      }
    };
    PrintRow("all layers", m, BestSeconds(layers), layers_bytes, layers_operations);
    const int64_t sampled = std::min<int64_t>(m, 32);
    const double vocabulary_operations = 2.0 * sampled * 49152 * 576;
    PrintRow("vocabulary Q8_0", sampled,
             BestSeconds([&] { Multiply(*ops, *vocabulary, sampled, x, y); }), vocabulary->bytes(),
             vocabulary_operations);
    PrintRow("all", m, BestSeconds([&] {
               layers();
               Multiply(*ops, *vocabulary, sampled, x, y);
             }),
             layers_bytes + vocabulary->bytes(), layers_operations + vocabulary_operations);
  }
  return 0;
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) {
  const std::string name = argc > 2 ? argv[2] : "Q4_1";
  for (int i = 0; i <= static_cast<int>(gloam::WeightType::kQ6_K); ++i) {
    const auto type = static_cast<gloam::WeightType>(i);
    if (gloam::InfoOf(type).name == name) {
      std::vector<int64_t> rows = {1, 8, 32, 512};
      if (argc > 3) rows = {std::clamp<int64_t>(std::atoi(argv[3]), 1, 512)};
      return gloam::Main(argc > 1 ? std::atoi(argv[1]) : 0, type, rows);
    }
  }
  fmt::print(stderr, "usage: gemm_bench [threads] [type] [rows]; unknown type {}\n", name);
  return 2;
}
