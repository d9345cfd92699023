// Speed of what decides in sparse attention on the CPU, one thread: Quest's block scores (3 query
// heads of 64 channels, bf16, blocks anywhere in the cache), top-k and top-p.
//   selector_bench
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "fmt/format.h"
#include "kernels/cpu/sparse/block_scores.h"
#include "kernels/cpu/sparse/top_k.h"
#include "kernels/prune.h"

namespace gloam::cpu {
namespace {

constexpr int kRepeats = 50;
constexpr int kHeads = 3;
constexpr int kHeadDim = 64;

// Median of the repetitions, in microseconds; f(i) works on copy i of kCopies.
constexpr int kCopies = 8;
template <typename F>
double MedianUs(const F& f) {
  std::vector<double> us;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f(i % kCopies);
    us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
                     .count());
  }
  std::nth_element(us.begin(), us.begin() + kRepeats / 2, us.end());
  return us[kRepeats / 2];
}

std::vector<float> RandomLogits(int64_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(static_cast<size_t>(count));
  for (float& logit : logits) logit = normal(rng);
  return logits;
}

void BenchScores(int64_t num_blocks, std::mt19937& rng) {
  SidecarConfig config;
  config.ranges = true;
  KvLayout layout = {DType::kBF16, 1, kHeadDim};
  const int64_t cache_blocks = num_blocks * kCopies;
  const int64_t bytes = SidecarBytes(SidecarKind::kRanges, config, layout);
  std::vector<uint16_t> ranges(static_cast<size_t>(cache_blocks * bytes / 2));
  for (uint16_t& value : ranges) value = static_cast<uint16_t>(0x3f00 + rng() % 256);
  std::vector<int32_t> table(static_cast<size_t>(cache_blocks));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), rng);

  KeyBlocks keys;
  keys.kv.layout = layout;
  keys.sidecars.config = &config;
  keys.sidecars.data[0] = reinterpret_cast<std::byte*>(ranges.data());
  keys.sidecars.head_bytes[0] = bytes;
  keys.sidecars.num_kv_heads = 1;
  keys.sidecars.num_blocks = cache_blocks;
  keys.num_blocks = num_blocks;
  const std::vector<float> queries = RandomLogits(kHeads * kHeadDim, rng);
  const std::vector<TokenMask> masks(static_cast<size_t>(kHeads * num_blocks), kAllTokens);
  std::vector<float> scores(static_cast<size_t>(kHeads * num_blocks * kBlockTokens));
  const double us = MedianUs([&](int copy) {
    keys.block_table = table.data() + copy * num_blocks;
    ScoreBlocks({.keys = keys,
                 .queries = queries.data(),
                 .num_heads = kHeads,
                 .head_dim = kHeadDim,
                 .masks = masks.data(),
                 .scores = scores.data()});
  });
  fmt::print("block scores  {:6} blocks            {:8.1f} us  {:6.1f} ns a block\n", num_blocks,
             us, us * 1e3 / static_cast<double>(num_blocks));
}

void BenchTopK(int64_t num_blocks, int64_t count, std::mt19937& rng) {
  const int64_t num_tokens = num_blocks * kBlockTokens;
  const std::vector<float> scores = RandomLogits(num_tokens * kCopies, rng);
  std::vector<TokenMask> masks(static_cast<size_t>(num_blocks));
  const double us = MedianUs([&](int copy) {
    std::fill(masks.begin(), masks.end(), kAllTokens);
    KeepTopTokens(scores.data() + copy * num_tokens, count, num_blocks, masks.data());
  });
  fmt::print("top-k         {:6} of {:6} tokens   {:8.1f} us\n", count, num_tokens, us);
}

// 512 blocks of candidates, spread over a context of num_blocks.
void BenchTopP(int64_t num_blocks, float scale, std::mt19937& rng) {
  const int64_t num_tokens = num_blocks * kBlockTokens;
  std::vector<float> logits = RandomLogits(num_tokens * kCopies, rng);
  for (float& logit : logits) logit *= scale;
  std::vector<TokenMask> candidates(static_cast<size_t>(num_blocks), kNoTokens);
  std::fill_n(candidates.begin(), 512, kAllTokens);
  std::shuffle(candidates.begin(), candidates.end(), rng);
  std::vector<float> weights(static_cast<size_t>(num_tokens));
  std::vector<TokenMask> kept(candidates.size());
  PruneParams params;
  params.pruner.type = PrunerType::kTopP;
  params.pruner.threshold = 0.85f;
  params.candidates = candidates.data();
  params.num_blocks = num_blocks;
  params.weights = weights.data();
  params.kept = kept.data();
  int64_t num_kept = 0;
  const double us = MedianUs([&](int copy) {
    params.logits = logits.data() + copy * num_tokens;
    num_kept = Prune(params).num_kept;
  });
  fmt::print("top-p 0.85    8192 of {:6} tokens   {:8.1f} us  {} kept\n", num_tokens, us, num_kept);
}

void Run() {
  std::mt19937 rng(20261123);
  for (const int64_t num_blocks : {480, 2048, 8000}) BenchScores(num_blocks, rng);
  BenchTopK(512, 1024, rng);
  BenchTopK(2048, 8192, rng);
  BenchTopK(8000, 8192, rng);
  for (const float scale : {0.1f, 1.0f, 4.0f}) {
    BenchTopP(512, scale, rng);
    BenchTopP(8000, scale, rng);
  }
}

}  // namespace
}  // namespace gloam::cpu

int main() {
  gloam::cpu::Run();
  return 0;
}
