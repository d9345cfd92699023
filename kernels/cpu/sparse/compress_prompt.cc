// SnapKV on the CPU: attention of the prompt's last tokens over the tokens before them, summed per
// KV head, pooled along the positions; the best stay. Once per request and layer, so plain loops.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/estimate.h"

namespace gloam::cpu {
namespace {

// Votes of the window's queries of one KV head's group: votes[i] += softmax weight of token i.
void AddVotes(const CompressPromptParams& params, int kv_head, int64_t num_tokens,
              std::vector<float>& votes) {
  const TensorView& q = params.q;
  const int head_dim = params.kv.layout.head_dim;
  const int num_heads = static_cast<int>(q.shape[1]) / params.kv.layout.num_kv_heads;
  const int64_t num_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t window = params.config.window_size;
  KeyBlocks keys;
  keys.kv = params.kv;
  keys.block_table =
      params.batch.block_tables + int64_t{params.seq} * params.batch.max_blocks_per_seq;
  keys.num_blocks = num_blocks;
  keys.kv_head = kv_head;
  std::vector<float> queries(num_heads * head_dim);
  std::vector<float> logits(num_heads * num_blocks * kBlockTokens);
  const std::vector<TokenMask> masks(num_heads * num_blocks, kAllTokens);

  for (int64_t i = 0; i < window; ++i) {
    const int64_t token = params.first_window_token + i;
    for (int head = 0; head < num_heads; ++head) {
      const float* from = static_cast<const float*>(q.data) + token * q.strides[0] +
                          (int64_t{kv_head} * num_heads + head) * q.strides[1];
      for (int c = 0; c < head_dim; ++c) queries[head * head_dim + c] = from[c] * params.scale;
    }
    Estimate({.estimator = {.type = EstimatorType::kNone},
              .keys = keys,
              .queries = queries.data(),
              .num_heads = num_heads,
              .head_dim = head_dim,
              .masks = masks.data(),
              .logits = logits.data()});
    const int64_t seen = num_tokens - window + i + 1;  // causal within the window
    for (int head = 0; head < num_heads; ++head) {
      const float* row = logits.data() + head * num_blocks * kBlockTokens;
      const float max = *std::max_element(row, row + seen);
      float sum = 0;
      for (int64_t t = 0; t < seen; ++t) sum += std::exp(row[t] - max);
      for (int64_t t = 0; t < static_cast<int64_t>(votes.size()); ++t) {
        votes[t] += std::exp(row[t] - max) / sum;
      }
    }
  }
}

std::vector<float> Pool(const std::vector<float>& votes, const CompressorConfig& config) {
  const auto size = static_cast<int64_t>(votes.size());
  const int64_t half = config.kernel_size / 2;
  std::vector<float> pooled(votes.size());
  for (int64_t i = 0; i < size; ++i) {
    const int64_t begin = std::max<int64_t>(0, i - half);
    const int64_t end = std::min(size, i + half + 1);
    pooled[i] = config.pooling == Pooling::kMax
                    ? *std::max_element(votes.begin() + begin, votes.begin() + end)
                    // Positions past the ends count as zero.
                    : std::accumulate(votes.begin() + begin, votes.begin() + end, 0.0f) /
                          static_cast<float>(config.kernel_size);
  }
  return pooled;
}

void Keep(TokenMask* masks, int64_t token) {
  masks[token / kBlockTokens] |= static_cast<TokenMask>(1u << (token % kBlockTokens));
}

}  // namespace

void CompressPrompt(const CompressPromptParams& params, ThreadPool& pool) {
  const CompressorConfig& config = params.config;
  const int64_t first_position = params.batch.positions[params.first_window_token];
  const int64_t num_tokens = first_position + config.window_size;  // of the prompt
  const int64_t num_kept = config.max_capacity_prompt - config.window_size;
  GLOAM_CHECK(first_position >= 0 && num_kept >= 0);
  pool.ParallelFor(params.kv.layout.num_kv_heads, [&](int64_t kv_head, int) {
    TokenMask* masks = params.compressed->Head(params.layer, static_cast<int>(kv_head));
    // Tokens past the prompt, in the last block, are kept.
    std::fill_n(masks, params.compressed->num_blocks, kNoTokens);
    const int64_t end = params.compressed->num_blocks * kBlockTokens;
    for (int64_t token = first_position; token < end; ++token) Keep(masks, token);
    if (first_position <= num_kept) {
      for (int64_t token = 0; token < first_position; ++token) Keep(masks, token);
      return;
    }
    std::vector<float> votes(first_position, 0.0f);
    AddVotes(params, static_cast<int>(kv_head), num_tokens, votes);
    const std::vector<float> pooled = Pool(votes, config);
    std::vector<int64_t> order(votes.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::nth_element(order.begin(), order.begin() + num_kept, order.end(),
                     [&](int64_t a, int64_t b) {
                       return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : a < b;
                     });
    for (int64_t i = 0; i < num_kept; ++i) Keep(masks, order[i]);
  });
}

}  // namespace gloam::cpu
