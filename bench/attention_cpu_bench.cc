// Speed of the CPU's attention in SmolLM2's shape (9 query heads, 3 KV heads of 64, bf16 cache, 30
// layers): decode in milliseconds per token and GB/s of KV read, beside the rate at which the same
// bytes can be read at all; many short contexts at once; prefill in GFLOP/s.
//   attention_cpu_bench [num_threads] [decode|streams|prefill]
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

namespace gloam::cpu {
namespace {

constexpr int kHeads = 9;
constexpr int kKvHeads = 3;
constexpr int kHeadDim = 64;
constexpr int kLayers = 30;
constexpr int kRepeats = 9;

template <typename F>
double BestSeconds(const F& f) {
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

struct Bench {
  ThreadPool pool;
  Scratch scratch;
  std::vector<Buffer> layers;
  KvLayerView view;
  std::vector<int32_t> block_table;
  std::vector<float> q, out;
  std::vector<int32_t> positions;

  Bench(int num_threads, int max_context) : pool(num_threads) {
    view.layout = {DType::kBF16, kKvHeads, kHeadDim};
    view.num_blocks = max_context / kBlockTokens;
    std::mt19937 rng(1);
    const int64_t elements = view.num_blocks * view.layout.block_elements();
    std::vector<uint16_t> values(elements);
    for (uint16_t& value : values) {
      value = Bf16FromFloat(static_cast<float>(rng() % 2001) / 1000 - 1);
    }
    for (int i = 0; i < kLayers; ++i) {
      layers.push_back(*AllocateBuffer(elements * 2));
      std::copy(values.begin(), values.end(), static_cast<uint16_t*>(layers.back().data()));
    }
    block_table.resize(view.num_blocks);
    std::iota(block_table.begin(), block_table.end(), 0);
    std::shuffle(block_table.begin(), block_table.end(), rng);
    q.resize(int64_t{max_context} * kHeads * kHeadDim);
    for (float& x : q) x = static_cast<float>(rng() % 2001) / 500 - 2;
    out.resize(q.size());
    positions.resize(max_context);
    std::iota(positions.begin(), positions.end(), 0);
  }

  // The last `num_tokens` of a context, in `num_layers` layers.
  void Run(int num_tokens, int context, int num_layers) {
    const int32_t cu_seqlens[] = {0, num_tokens};
    const int32_t context_len = context;
    RunLayers({.num_seqs = 1,
               .num_tokens = num_tokens,
               .max_blocks_per_seq = static_cast<int>(block_table.size()),
               .positions = positions.data() + context - num_tokens,
               .cu_seqlens = cu_seqlens,
               .context_lens = &context_len,
               .block_tables = block_table.data()},
              num_layers);
  }

  // The last token of `num_seqs` contexts in blocks of their own, in all layers.
  void RunStreams(int num_seqs, int context) {
    std::vector<int32_t> cu_seqlens(num_seqs + 1);
    std::iota(cu_seqlens.begin(), cu_seqlens.end(), 0);
    const std::vector<int32_t> context_lens(num_seqs, context);
    const std::vector<int32_t> last_positions(num_seqs, context - 1);
    RunLayers({.num_seqs = num_seqs,
               .num_tokens = num_seqs,
               .max_blocks_per_seq = context / kBlockTokens,
               .positions = last_positions.data(),
               .cu_seqlens = cu_seqlens.data(),
               .context_lens = context_lens.data(),
               .block_tables = block_table.data()},
              kLayers);
  }

  void RunLayers(const SequenceBatch& batch, int num_layers) {
    AttentionParams params;
    params.batch = batch;
    params.q = TensorView::Contiguous(q.data(), DType::kF32, Device::kCpu,
                                      {batch.num_tokens, kHeads, kHeadDim});
    params.out = params.q;
    params.out.data = out.data();
    params.kv = view;
    params.scale = 0.125f;
    for (int layer = 0; layer < num_layers; ++layer) {
      params.kv.data = layers[layer].data();
      Attention(params, pool, scratch);
    }
  }

  // Seconds to read the cache of `context` tokens in all layers, in order.
  double ReadSeconds(int context) {
    const int64_t words = view.layout.block_bytes() * (context / kBlockTokens) / 8;
    std::vector<uint64_t> sums(64 * 8);
    return BestSeconds([&] {
      pool.ParallelFor(kLayers, [&](int64_t layer, int thread) {
        const uint64_t* data = static_cast<const uint64_t*>(layers[layer].data());
        uint64_t sum[8] = {};
        for (int64_t i = 0; i < words; i += 8) {
          for (int j = 0; j < 8; ++j) sum[j] += data[i + j];
        }
        for (int j = 0; j < 8; ++j) sums[thread * 8 + j] += sum[j];
      });
    });
  }
};

constexpr int kMaxContext = 7680;

void MeasureDecode(Bench& bench) {
  for (const int context : {128, 512, 1024, 4096, kMaxContext}) {
    const double bytes = 4.0 * kKvHeads * kHeadDim * context * kLayers;
    const double seconds = BestSeconds([&] { bench.Run(1, context, kLayers); });
    const double read = bench.ReadSeconds(context);
    fmt::print("decode  context {:5}: {:7.3f} ms/token  {:6.1f} GB/s  (plain read {:6.1f} GB/s)\n",
               context, seconds * 1e3, bytes / seconds * 1e-9, bytes / read * 1e-9);
  }
}

void MeasureStreams(Bench& bench) {
  constexpr int kStreams = 32;
  for (const int context : {128, 192}) {
    const double bytes = 4.0 * kKvHeads * kHeadDim * context * kStreams * kLayers;
    const double seconds = BestSeconds([&] { bench.RunStreams(kStreams, context); });
    fmt::print("streams {} of {:4} tokens: {:7.3f} ms/step  {:6.1f} GB/s\n", kStreams, context,
               seconds * 1e3, bytes / seconds * 1e-9);
  }
}

void MeasurePrefill(Bench& bench) {
  for (const auto& [tokens, context] :
       {std::pair{128, 128}, {512, 512}, {512, kMaxContext}, {kMaxContext, kMaxContext}}) {
    const int first = context - tokens;
    const double pairs = (first + 1.0 + context) / 2 * tokens;
    const double flops = 4.0 * kHeads * kHeadDim * pairs;
    const double seconds = BestSeconds([&] { bench.Run(tokens, context, 1); });
    fmt::print("prefill {:4} of {:5}: {:8.3f} ms/layer  {:6.1f} GFLOP/s\n", tokens, context,
               seconds * 1e3, flops / seconds * 1e-9);
  }
}

}  // namespace
}  // namespace gloam::cpu

int main(int argc, char** argv) {
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const std::string what = argc > 2 ? argv[2] : "";
  if (num_threads < 1 || num_threads > 64 ||
      (!what.empty() && what != "decode" && what != "streams" && what != "prefill")) {
    fmt::print(stderr,
               "usage: attention_cpu_bench [num_threads, 1 to 64] [decode|streams|prefill]\n");
    return 2;
  }
  gloam::cpu::Bench bench(num_threads, gloam::cpu::kMaxContext);
  fmt::print("threads {}\n", num_threads);
  if (what.empty() || what == "decode") gloam::cpu::MeasureDecode(bench);
  if (what.empty() || what == "streams") gloam::cpu::MeasureStreams(bench);
  if (what.empty() || what == "prefill") gloam::cpu::MeasurePrefill(bench);
  return 0;
}
