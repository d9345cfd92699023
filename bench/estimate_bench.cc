// Speed of the estimators and of making sidecars on one core: nanoseconds per block of 16 tokens
// and KV head (all query heads of the group together) and GB/s of mirror read. Blocks lie at random
// places of a pool of a model's size, so that most come from memory.
//   estimate_bench [num_blocks]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/estimate.h"

namespace gloam::cpu {
namespace {

constexpr int kKvHeads = 3;
constexpr int kLayers = 10;  // with all mirrors about 100 MB at 2,000 blocks and 64 channels
constexpr int kRepeats = 7;

struct Layer {
  Buffer kv;
  std::vector<Buffer> sidecars;
  KvLayerView kv_view;
  SidecarLayerView sidecar_view;
};

struct Bench {
  ThreadPool pool{1};
  SidecarConfig config;
  std::vector<Layer> layers;
  std::vector<int32_t> block_table, positions;
  int head_dim = 0;
  int64_t num_blocks = 0;

  Bench(int head_dim, int64_t num_blocks) : head_dim(head_dim), num_blocks(num_blocks) {
    config.ranges = config.mean_values = true;
    config.block_quant_bits = config.min_max_quant_bits = config.max_quant_bits = 4;
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(1 << 16);
    for (uint16_t& value : values) value = Bf16FromFloat(normal(rng));
    layers.resize(kLayers);
    for (Layer& layer : layers) {
      layer.kv_view.layout = {DType::kBF16, kKvHeads, head_dim};
      layer.kv_view.num_blocks = num_blocks;
      const int64_t elements = num_blocks * layer.kv_view.layout.block_elements();
      layer.kv = *AllocateBuffer(elements * 2);
      layer.kv_view.data = layer.kv.data();
      auto* data = static_cast<uint16_t*>(layer.kv.data());
      for (int64_t i = 0; i < elements; ++i) data[i] = values[(i * 7) % values.size()];
      layer.sidecar_view.config = &config;
      layer.sidecar_view.num_kv_heads = kKvHeads;
      layer.sidecar_view.num_blocks = num_blocks;
      for (int k = 0; k < kNumSidecarKinds; ++k) {
        const int64_t bytes =
            SidecarBytes(static_cast<SidecarKind>(k), config, layer.kv_view.layout);
        layer.sidecar_view.head_bytes[k] = bytes;
        layer.sidecars.push_back(
            *AllocateBuffer(std::max<int64_t>(64, bytes * kKvHeads * num_blocks)));
        layer.sidecar_view.data[k] = static_cast<std::byte*>(layer.sidecars.back().data());
      }
    }
    block_table.resize(num_blocks);
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), rng);
    positions.resize(num_blocks * kBlockTokens);
    std::iota(positions.begin(), positions.end(), 0);
  }

  // Nanoseconds per block and KV head, the best of some passes over all layers.
  template <typename F>
  double Measure(const F& f) {
    double best = 1e9;
    for (int i = 0; i < kRepeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      for (Layer& layer : layers) f(layer);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      best = std::min(best, taken.count());
    }
    return best * 1e9 / static_cast<double>(kLayers * kKvHeads * num_blocks);
  }

  void MakeSidecars(Layer& layer) {
    const int32_t num_tokens = static_cast<int32_t>(num_blocks * kBlockTokens);
    const int32_t cu_seqlens[] = {0, num_tokens};
    UpdateSidecarsParams params;
    params.batch.num_seqs = 1;
    params.batch.num_tokens = num_tokens;
    params.batch.max_blocks_per_seq = static_cast<int>(num_blocks);
    params.batch.positions = positions.data();
    params.batch.cu_seqlens = cu_seqlens;
    params.batch.context_lens = &cu_seqlens[1];
    params.batch.block_tables = block_table.data();
    params.kv = layer.kv_view;
    params.sidecars = layer.sidecar_view;
    UpdateSidecars(params, pool);
  }

  void EstimateRow(Layer& layer, EstimatorType type, int num_heads, const float* queries,
                   const TokenMask* masks, float* logits) {
    EstimateParams params;
    params.estimator = {type, 4};
    params.keys = {layer.kv_view, layer.sidecar_view, block_table.data(), num_blocks, 0};
    params.queries = queries;
    params.num_heads = num_heads;
    params.head_dim = head_dim;
    params.masks = masks;
    params.logits = logits;
    for (int head = 0; head < kKvHeads; ++head) {
      params.keys.kv_head = head;
      Estimate(params);
    }
  }
};

void RunAll(int head_dim, int64_t num_blocks) {
  Bench bench(head_dim, num_blocks);
  const double update = bench.Measure([&](Layer& layer) { bench.MakeSidecars(layer); });
  fmt::print("head_dim {} blocks {}: ranges, means and three 4-bit mirrors made in {:.0f} ns\n",
             head_dim, num_blocks, update);
  struct Case {
    const char* name;
    EstimatorType type;
    int64_t bytes;
  };
  const int64_t d = head_dim;
  const Case cases[] = {{"block_quant", EstimatorType::kBlockQuant, 4 * d + 8 * d},
                        {"min_max_quant", EstimatorType::kMinMaxQuant, 64 + 8 * d},
                        {"max_quant", EstimatorType::kMaxQuant, 64 + 8 * d},
                        {"none", EstimatorType::kNone, 32 * d}};
  for (const int num_heads : {1, 3, 4, 7}) {
    std::mt19937 rng(2);
    std::normal_distribution<float> normal;
    std::vector<float> queries(num_heads * head_dim);
    for (float& q : queries) q = normal(rng);
    std::vector<TokenMask> masks(num_heads * num_blocks, kAllTokens);
    std::vector<float> logits(num_heads * num_blocks * kBlockTokens);
    for (const Case& c : cases) {
      const double ns = bench.Measure([&](Layer& layer) {
        bench.EstimateRow(layer, c.type, num_heads, queries.data(), masks.data(), logits.data());
      });
      fmt::print("  {} heads  {:<14}{:6.1f} ns/block {:6.1f} GB/s\n", num_heads, c.name, ns,
                 static_cast<double>(c.bytes) / ns);
    }
  }
}

}  // namespace
}  // namespace gloam::cpu

int main(int argc, char** argv) {
  const int64_t num_blocks = argc > 1 ? std::atoll(argv[1]) : 2000;
  for (const int head_dim : {64, 128}) gloam::cpu::RunAll(head_dim, num_blocks);
}
