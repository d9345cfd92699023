// Attention on the CPU: against a double-precision reference, and bit for bit against itself under
// every way of cutting the same tokens into chunks, batches and threads.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/float16.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 20261122;

struct Shape {
  int num_kv_heads = 1;
  int heads_per_kv = 1;
  int head_dim = 64;
  int window = 0;
  DType dtype = DType::kBF16;

  int num_heads() const { return num_kv_heads * heads_per_kv; }
};

// A pool of blocks full of NaN in which sequences of random keys and values live in random blocks.
struct Cache {
  Shape shape;
  std::vector<int> lengths;
  int max_blocks = 0;
  std::vector<std::byte> memory;
  KvLayerView view;
  std::vector<int32_t> block_tables;
  std::vector<std::vector<float>> queries;  // for each sequence, [length, num_heads, head_dim]

  Cache(const Shape& s, std::vector<int> lens, std::mt19937& rng) : shape(s), lengths(lens) {
    int num_blocks = 3;
    for (const int length : lengths) {
      const int blocks = (length + kBlockTokens - 1) / kBlockTokens;
      max_blocks = std::max(max_blocks, blocks + 1);
      num_blocks += blocks;
    }
    view.layout = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    view.num_blocks = num_blocks;
    memory.resize(static_cast<size_t>(view.layout.block_bytes() * num_blocks) + 64);
    view.data =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    const int64_t elements = view.layout.block_elements() * num_blocks;
    for (int64_t i = 0; i < elements; ++i) Write(i, std::numeric_limits<float>::quiet_NaN());

    std::vector<int32_t> ids(num_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), rng);
    block_tables.assign(lengths.size() * max_blocks, -1);
    std::normal_distribution<float> normal;
    int next = 0;
    for (size_t seq = 0; seq < lengths.size(); ++seq) {
      for (int i = 0; i * kBlockTokens < lengths[seq]; ++i) {
        block_tables[seq * max_blocks + i] = ids[next++];
      }
      for (int position = 0; position < lengths[seq]; ++position) {
        for (int head = 0; head < shape.num_kv_heads; ++head) {
          for (int c = 0; c < shape.head_dim; ++c) {
            Write(IndexOf(seq, position, head, c, 0), normal(rng));
            Write(IndexOf(seq, position, head, c, 1), normal(rng));
          }
        }
      }
      queries.emplace_back(int64_t{lengths[seq]} * shape.num_heads() * shape.head_dim);
      for (float& q : queries.back()) q = 2 * normal(rng);
    }
  }

  int64_t IndexOf(size_t seq, int position, int head, int c, int key_or_value) const {
    const int64_t block = block_tables[seq * max_blocks + position / kBlockTokens];
    const int64_t run = (block * 2 + key_or_value) * shape.num_kv_heads + head;
    return (run * kBlockTokens + position % kBlockTokens) * shape.head_dim + c;
  }
  void Write(int64_t i, float value) {
    if (shape.dtype == DType::kBF16) {
      static_cast<uint16_t*>(view.data)[i] = Bf16FromFloat(value);
    } else if (shape.dtype == DType::kF16) {
      static_cast<uint16_t*>(view.data)[i] = F32ToF16(value);
    } else {
      static_cast<float*>(view.data)[i] = value;
    }
  }
  double Read(int64_t i) const {
    if (shape.dtype == DType::kF16) return F16ToF32(static_cast<uint16_t*>(view.data)[i]);
    return shape.dtype == DType::kBF16 ? FloatFromBf16(static_cast<uint16_t*>(view.data)[i])
                                       : static_cast<float*>(view.data)[i];
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape.head_dim)); }
};

// A run of consecutive tokens of one sequence.
struct Chunk {
  int seq = 0;
  int begin = 0;
  int end = 0;
};

using Outputs = std::vector<std::vector<float>>;  // laid out as Cache::queries

Outputs EmptyOutputs(const Cache& cache) {
  Outputs outputs;
  for (const auto& q : cache.queries) outputs.emplace_back(q.size(), -1.0f);
  return outputs;
}

// One call of Attention with the chunks as its sequences. Rows of q and out have a stride of their
// own, as in a fused QKV matrix.
void Run(const Cache& cache, const std::vector<Chunk>& chunks, ThreadPool& pool, Scratch& scratch,
         Outputs& outputs) {
  const Shape& shape = cache.shape;
  const int64_t width = int64_t{shape.num_heads()} * shape.head_dim;
  std::vector<int32_t> positions, cu_seqlens = {0}, context_lens, tables;
  std::vector<float> q, out;
  for (const Chunk& chunk : chunks) {
    for (int p = chunk.begin; p < chunk.end; ++p) positions.push_back(p);
    cu_seqlens.push_back(static_cast<int32_t>(positions.size()));
    context_lens.push_back(chunk.end);
    const auto table = cache.block_tables.begin() + chunk.seq * cache.max_blocks;
    tables.insert(tables.end(), table, table + cache.max_blocks);
    for (int p = chunk.begin; p < chunk.end; ++p) {
      const auto row = cache.queries[chunk.seq].begin() + p * width;
      q.insert(q.end(), row, row + width);
      q.resize(q.size() + 3);  // an odd stride
    }
  }
  const int num_tokens = static_cast<int>(positions.size());
  out.assign(num_tokens * width, -2.0f);
  AttentionParams params;
  params.batch.num_seqs = static_cast<int>(chunks.size());
  params.batch.num_tokens = num_tokens;
  params.batch.max_blocks_per_seq = cache.max_blocks;
  params.batch.positions = positions.data();
  params.batch.cu_seqlens = cu_seqlens.data();
  params.batch.context_lens = context_lens.data();
  params.batch.block_tables = tables.data();
  params.q = TensorView::Contiguous(q.data(), DType::kF32, Device::kCpu,
                                    {num_tokens, shape.num_heads(), shape.head_dim});
  params.q.strides[0] = width + 3;
  params.out = TensorView::Contiguous(out.data(), DType::kF32, Device::kCpu,
                                      {num_tokens, shape.num_heads(), shape.head_dim});
  params.kv = cache.view;
  params.scale = cache.scale();
  params.sliding_window = shape.window;
  Attention(params, pool, scratch);
  const float* from = out.data();
  for (const Chunk& chunk : chunks) {
    const int64_t count = (chunk.end - chunk.begin) * width;
    std::copy_n(from, count, outputs[chunk.seq].begin() + chunk.begin * width);
    from += count;
  }
}

std::vector<Chunk> WholeSequences(const Cache& cache) {
  std::vector<Chunk> chunks;
  for (size_t seq = 0; seq < cache.lengths.size(); ++seq) {
    chunks.push_back({static_cast<int>(seq), 0, cache.lengths[seq]});
  }
  return chunks;
}

// Largest distance from the plain softmax in double precision, over the given positions.
double LargestError(const Cache& cache, const Outputs& outputs, int seq, int position) {
  const Shape& shape = cache.shape;
  double largest = 0;
  const int begin = shape.window == 0 ? 0 : std::max(0, position - shape.window + 1);
  for (int head = 0; head < shape.num_heads(); ++head) {
    const int64_t row = (int64_t{position} * shape.num_heads() + head) * shape.head_dim;
    const int kv_head = head / shape.heads_per_kv;
    std::vector<double> scores;
    for (int p = begin; p <= position; ++p) {
      double dot = 0;
      for (int c = 0; c < shape.head_dim; ++c) {
        dot +=
            double{cache.queries[seq][row + c]} * cache.Read(cache.IndexOf(seq, p, kv_head, c, 0));
      }
      scores.push_back(dot * cache.scale());
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double& score : scores) sum += score = std::exp(score - max);
    for (int c = 0; c < shape.head_dim; ++c) {
      double expected = 0;
      for (int p = begin; p <= position; ++p) {
        expected += scores[p - begin] / sum * cache.Read(cache.IndexOf(seq, p, kv_head, c, 1));
      }
      const double error = std::abs(expected - double{outputs[seq][row + c]});
      largest =
          std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(largest, error);
    }
  }
  return largest;
}

// Keys, values and queries are of order 1 to 2, so scores stay below about 2 * sqrt(head_dim) * 3;
// their fp32 error is below head_dim * 2^-24 times that, and so is the relative error of each
// probability. The weighted mean of values of order 4 cannot be worse than that, times 4; the sums
// over the context add errors of n * 2^-24 at most.
double Tolerance(const Cache& cache, int position) {
  const double epsilon = std::ldexp(1.0, -24);
  const double dim = cache.shape.head_dim;
  return 4 * epsilon * (dim * 6 * std::sqrt(dim) + position + 64);
}

void CheckAgainstReference(const Cache& cache, const Outputs& outputs) {
  for (size_t seq = 0; seq < cache.lengths.size(); ++seq) {
    const int length = cache.lengths[seq];
    for (int position = 0; position < length; ++position) {
      // All rows of short sequences; of long ones, those around the edges and every 37th.
      const bool edge = position % kBlockTokens <= 1 && position % 512 < 40;
      if (length > 100 && !edge && position % 37 != 0 && position + 3 < length) continue;
      const double error = LargestError(cache, outputs, static_cast<int>(seq), position);
      if (!(error <= Tolerance(cache, position))) {
        FAIL("sequence " << seq << " position " << position << " error " << error);
      }
    }
  }
}

bool SameBits(const Outputs& a, const Outputs& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("attention equals the double-precision softmax") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  ThreadPool pool(2);
  Scratch scratch;
  const std::vector<int> lengths = {1, 2, 15, 16, 17, 31, 32, 33, 100};
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int head_dim : {16, 48, 64, 128}) {
      for (const int heads_per_kv : {1, 3, 4, 6, 8}) {
        const Shape shape = {2, heads_per_kv, head_dim, 0, dtype};
        CAPTURE(head_dim, heads_per_kv, static_cast<int>(dtype));
        const Cache cache(shape, lengths, rng);
        Outputs outputs = EmptyOutputs(cache);
        Run(cache, WholeSequences(cache), pool, scratch, outputs);
        CheckAgainstReference(cache, outputs);
      }
    }
  }
}

TEST_CASE("attention over several partitions, and with a sliding window") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  ThreadPool pool(3);
  Scratch scratch;
  for (const int window : {0, 1, 16, 33, 500, 513, 4096}) {
    const Shape shape = {1, 3, 64, window, window == 33 ? DType::kF32 : DType::kBF16};
    CAPTURE(window);
    const Cache cache(shape, {511, 512, 513, 1100}, rng);
    Outputs outputs = EmptyOutputs(cache);
    Run(cache, WholeSequences(cache), pool, scratch, outputs);
    CheckAgainstReference(cache, outputs);
  }
}

TEST_CASE("attention is right on every SIMD target") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 2);
  ThreadPool pool(2);
  Scratch scratch;
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    const Cache cache({2, 3, 80, 40, dtype}, {1, 47, 90}, rng);
    ForEachSimdTarget([&] {
      Outputs outputs = EmptyOutputs(cache);
      Run(cache, WholeSequences(cache), pool, scratch, outputs);
      CheckAgainstReference(cache, outputs);
    });
  }
}

TEST_CASE("a row does not depend on chunks, neighbours or threads") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 3);
  ThreadPool one(1), two(2), three(3);
  ThreadPool* const pools[] = {&one, &two, &three};
  Scratch scratch;
  const Shape shapes[] = {
      {3, 3, 64, 0, DType::kBF16},  {2, 1, 128, 0, DType::kBF16}, {1, 8, 64, 0, DType::kF32},
      {2, 6, 128, 0, DType::kBF16}, {3, 4, 64, 100, DType::kF16}, {1, 3, 64, 600, DType::kF32},
  };
  for (const Shape& shape : shapes) {
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.window);
    const Cache cache(shape, {1, 17, 513, 1300, 64}, rng);
    Outputs expected = EmptyOutputs(cache);
    Run(cache, WholeSequences(cache), one, scratch, expected);
    for (int trial = 0; trial < 8; ++trial) {
      // Trials 0 and 1 decode token by token from somewhere on; the others take random chunks.
      const int decode_from = trial < 2 ? 1200 : std::numeric_limits<int>::max();
      std::vector<int> done(cache.lengths.size(), 0);
      Outputs outputs = EmptyOutputs(cache);
      for (;;) {
        std::vector<Chunk> chunks;
        for (size_t seq = 0; seq < done.size(); ++seq) {
          const int left = cache.lengths[seq] - done[seq];
          if (left == 0 || rng() % 4 == 0) continue;
          const int sizes[] = {1, 1, 3, 16, 100, 700, left};
          const int size = done[seq] >= decode_from ? 1 : std::min(left, sizes[rng() % 7]);
          chunks.push_back({static_cast<int>(seq), done[seq], done[seq] + size});
          done[seq] += size;
        }
        std::shuffle(chunks.begin(), chunks.end(), rng);
        if (!chunks.empty()) Run(cache, chunks, *pools[rng() % 3], scratch, outputs);
        if (done == cache.lengths) break;
      }
      REQUIRE(SameBits(expected, outputs));
    }
  }
}

TEST_CASE("a lone long sequence is split over threads without a trace") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 4);
  ThreadPool one(1), three(3);
  Scratch scratch;
  const Cache cache({3, 3, 64, 0, DType::kBF16}, {4001}, rng);
  const std::vector<Chunk> last = {{0, 4000, 4001}};
  Outputs expected = EmptyOutputs(cache);
  Run(cache, last, one, scratch, expected);
  REQUIRE(LargestError(cache, expected, 0, 4000) <= Tolerance(cache, 4000));
  for (int trial = 0; trial < 50; ++trial) {
    Outputs outputs = EmptyOutputs(cache);
    Run(cache, last, three, scratch, outputs);
    REQUIRE(SameBits(expected, outputs));
  }
}

TEST_CASE("large scores neither overflow nor lose the maximum") {
  std::mt19937 rng(kSeed + 5);
  ThreadPool pool(2);
  Scratch scratch;
  Cache cache({1, 2, 64, 0, DType::kF32}, {600}, rng);
  for (float& q : cache.queries[0]) q *= 1000;
  Outputs outputs = EmptyOutputs(cache);
  Run(cache, WholeSequences(cache), pool, scratch, outputs);
  // The softmax is all but one-hot: each row is the value of its best key.
  const Shape& shape = cache.shape;
  for (int position = 0; position < 600; position += 7) {
    double best = -std::numeric_limits<double>::infinity();
    double second = best;
    int arg = 0;
    const int64_t row = int64_t{position} * 2 * shape.head_dim;
    for (int p = 0; p <= position; ++p) {
      double dot = 0;
      for (int c = 0; c < shape.head_dim; ++c) {
        dot += double{cache.queries[0][row + c]} * cache.Read(cache.IndexOf(0, p, 0, c, 0));
      }
      if (dot > best) {
        second = best;
        best = dot;
        arg = p;
      } else {
        second = std::max(second, dot);
      }
    }
    if ((best - second) * cache.scale() < 40) continue;
    for (int c = 0; c < shape.head_dim; ++c) {
      REQUIRE(outputs[0][row + c] ==
              Approx(cache.Read(cache.IndexOf(0, arg, 0, c, 1))).margin(1e-5));
    }
  }
}

}  // namespace gloam::cpu
