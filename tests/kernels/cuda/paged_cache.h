// A paged cache of random keys and values on the host and the GPU, with queries, and the distance
// of a result from the exact softmax over them: shared by the tests of attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "kernels/paged_kv.h"
#include "tests/kernels/cuda/cache_values.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {

struct AttentionShape {
  int num_kv_heads = 2;
  int heads_per_kv = 1;
  int head_dim = 128;
  int window = 0;
  DType dtype = DType::kBF16;

  int num_heads() const { return num_kv_heads * heads_per_kv; }
  int width() const { return num_heads() * head_dim; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
};

// Normal numbers, rounded; drawn once, because there are many.
class Numbers {
 public:
  Numbers(DType dtype, std::mt19937& rng) : rng_(rng) {
    std::normal_distribution<float> normal(0, 1.5f);
    std::vector<float> values(kCount);
    for (float& x : values) x = normal(rng);
    bytes_ = ToBytes(dtype, values);
    size_ = DTypeBytes(dtype);
  }
  // Fills `bytes` bytes.
  void Fill(void* to, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += size_) {
      std::memcpy(static_cast<uint8_t*>(to) + at, &bytes_[rng_() % kCount * size_], size_);
    }
  }

 private:
  static constexpr int kCount = 1 << 14;
  std::mt19937& rng_;
  std::vector<uint8_t> bytes_;
  size_t size_;  // of a number
};

// A pool of blocks full of NaN in which sequences of random keys and values live in random blocks,
// and a query for the last `num_queries` tokens of each.
struct PagedCache {
  AttentionShape shape;
  std::vector<int> lengths;
  int num_queries;
  int max_blocks = 1;
  KvLayout layout;
  std::vector<uint8_t> memory;
  std::vector<int32_t> block_tables;
  std::vector<std::vector<uint16_t>> queries;  // of each sequence, [num_queries, width]
  DeviceArray<uint8_t> device_memory;

  PagedCache(const AttentionShape& s, std::vector<int> lens, std::mt19937& rng,
             int queries_per_seq = 1)
      : shape(s), lengths(std::move(lens)), num_queries(queries_per_seq), device_memory(1) {
    layout = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    int num_blocks = 3;
    for (const int length : lengths) {
      max_blocks = std::max(max_blocks, BlocksOf(length) + 1);
      num_blocks += BlocksOf(length);
    }
    std::vector<int32_t> free(num_blocks);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng);
    memory.assign(layout.block_bytes() * num_blocks, 0xFF);
    block_tables.assign(lengths.size() * max_blocks, num_blocks - 1);
    Numbers numbers(shape.dtype, rng), query_numbers(query_dtype(), rng);
    const auto size = static_cast<int64_t>(DTypeBytes(shape.dtype));
    for (size_t seq = 0; seq < lengths.size(); ++seq) {
      for (int i = 0; i < BlocksOf(lengths[seq]); ++i) {
        block_tables[seq * max_blocks + i] = free.back();
        free.pop_back();
        const int tokens = std::min(kBlockTokens, lengths[seq] - i * kBlockTokens);
        for (int run = 0; run < 2 * shape.num_kv_heads; ++run) {
          numbers.Fill(memory.data() + block_tables[seq * max_blocks + i] * layout.block_bytes() +
                           run * layout.head_run_elements() * size,
                       tokens * shape.head_dim * size);
        }
      }
      queries.emplace_back(int64_t{num_queries} * shape.width());
      query_numbers.Fill(queries.back().data(),
                         static_cast<int64_t>(queries.back().size() * sizeof(uint16_t)));
    }
    device_memory = DeviceArray<uint8_t>(memory);
  }

  DType query_dtype() const { return QueryDTypeOf(shape.dtype); }
  KvLayerView device_view() const {
    return {.data = device_memory.data(),
            .layout = layout,
            .num_blocks = static_cast<int64_t>(memory.size()) / layout.block_bytes()};
  }

  // The memory in the 16-bit type of queries, which the CPU backend reads and which holds every
  // value of the cache's.
  std::vector<uint16_t> Widened() const {
    return RoundTo(query_dtype(), FromBytes(shape.dtype, memory));
  }

  static int BlocksOf(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

  // A token's keys (values) of a head.
  std::vector<float> Values(int seq, int position, int kv_head, bool values) const {
    const int32_t block = block_tables[seq * max_blocks + position / kBlockTokens];
    const int64_t row = (kv_head + (values ? shape.num_kv_heads : 0)) * int64_t{kBlockTokens} +
                        position % kBlockTokens;
    const auto row_bytes = static_cast<int64_t>(shape.head_dim * DTypeBytes(shape.dtype));
    return FromBytes(shape.dtype, std::span(memory).subspan(
                                      block * layout.block_bytes() + row * row_bytes, row_bytes));
  }
};

// The largest distance of a row from the softmax in double precision, in tolerances. What the
// kernel rounds: probabilities and outputs to 16 bits (half a unit in the last place each); the
// rest is fp32, where a score's error is that of a sum of head_dim products of order 2.
// `pieces_are_bf16`: the results of pieces of the context are rounded too.
inline double LargestError(const PagedCache& cache, int seq, int context, int query,
                           const uint16_t* row, bool pieces_are_bf16 = false) {
  const AttentionShape& shape = cache.shape;
  const double prob_epsilon =
      (cache.query_dtype() == DType::kF16 ? 0x1p-11 : 0x1p-8) + (pieces_are_bf16 ? 0x1p-8 : 0);
  const int begin = shape.window == 0 ? 0 : std::max(0, context - shape.window);
  const std::vector<float> out = ToFloat(DType::kBF16, std::span(row, shape.width()));
  double largest = 0;
  for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    std::vector<std::vector<float>> keys, values;
    for (int p = begin; p < context; ++p) {
      keys.push_back(cache.Values(seq, p, kv_head, false));
      values.push_back(cache.Values(seq, p, kv_head, true));
    }
    for (int h = 0; h < shape.heads_per_kv; ++h) {
      const int head = kv_head * shape.heads_per_kv + h;
      const int64_t at = int64_t{query} * shape.width() + head * shape.head_dim;
      const std::vector<float> q =
          ToFloat(cache.query_dtype(), std::span(cache.queries[seq]).subspan(at, shape.head_dim));
      std::vector<double> probs(keys.size());
      double max = -std::numeric_limits<double>::infinity();
      for (size_t i = 0; i < keys.size(); ++i) {
        double dot = 0;
        for (int c = 0; c < shape.head_dim; ++c) dot += double{q[c]} * double{keys[i][c]};
        max = std::max(max, probs[i] = dot * double{shape.scale()});
      }
      double sum = 0;
      for (double& x : probs) sum += x = std::exp(x - max);
      std::vector<double> expected(shape.head_dim), magnitude(shape.head_dim);
      for (size_t i = 0; i < keys.size(); ++i) {
        for (int c = 0; c < shape.head_dim; ++c) {
          expected[c] += probs[i] / sum * double{values[i][c]};
          magnitude[c] += probs[i] / sum * std::abs(double{values[i][c]});
        }
      }
      const double fp32_epsilon = 0x1p-24 * (8 * shape.head_dim + 64);
      for (int c = 0; c < shape.head_dim; ++c) {
        const double tolerance =
            (prob_epsilon + fp32_epsilon) * magnitude[c] + 0x1p-8 * std::abs(expected[c]) + 1e-30;
        const double error =
            std::abs(double{out[head * shape.head_dim + c]} - expected[c]) / tolerance;
        largest =
            std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(largest, error);
      }
    }
  }
  return largest;
}

}  // namespace gloam::cuda
