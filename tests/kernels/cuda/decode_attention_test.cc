// Decode attention on the GPU: against a double-precision softmax over the rounded inputs and
// against the CPU backend, and bit for bit against itself in other batches.
#include "kernels/cuda/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/paged_kv.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 20261125;

struct Shape {
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
    bits_ = RoundTo(dtype, values);
  }
  void Fill(uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = bits_[rng_() % kCount];
  }

 private:
  static constexpr int kCount = 1 << 14;
  std::mt19937& rng_;
  std::vector<uint16_t> bits_;
};

// A pool of blocks full of NaN in which sequences of random keys and values live in random blocks,
// and a query for the last `num_queries` tokens of each.
struct Cache {
  Shape shape;
  std::vector<int> lengths;
  int num_queries;
  int max_blocks = 1;
  KvLayout layout;
  std::vector<uint16_t> memory;
  std::vector<int32_t> block_tables;
  std::vector<std::vector<uint16_t>> queries;  // of each sequence, [num_queries, width]
  DeviceArray<uint16_t> device_memory;

  Cache(const Shape& s, std::vector<int> lens, std::mt19937& rng, int queries_per_seq = 1)
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
    memory.assign(layout.block_elements() * num_blocks, 0xFFFF);
    block_tables.assign(lengths.size() * max_blocks, num_blocks - 1);
    Numbers numbers(shape.dtype, rng);
    for (size_t seq = 0; seq < lengths.size(); ++seq) {
      for (int i = 0; i < BlocksOf(lengths[seq]); ++i) {
        block_tables[seq * max_blocks + i] = free.back();
        free.pop_back();
        const int tokens = std::min(kBlockTokens, lengths[seq] - i * kBlockTokens);
        for (int run = 0; run < 2 * shape.num_kv_heads; ++run) {
          numbers.Fill(memory.data() +
                           block_tables[seq * max_blocks + i] * layout.block_elements() +
                           run * layout.head_run_elements(),
                       int64_t{tokens} * shape.head_dim);
        }
      }
      queries.emplace_back(int64_t{num_queries} * shape.width());
      numbers.Fill(queries.back().data(), static_cast<int64_t>(queries.back().size()));
    }
    device_memory = DeviceArray<uint16_t>(memory);
  }

  static int BlocksOf(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

  // A token's keys (values) of a head.
  const uint16_t* Run(int seq, int position, int kv_head, bool values) const {
    const int32_t block = block_tables[seq * max_blocks + position / kBlockTokens];
    return memory.data() + block * layout.block_elements() +
           (kv_head + (values ? shape.num_kv_heads : 0)) * layout.head_run_elements() +
           position % kBlockTokens * shape.head_dim;
  }
};

// Some last queries of a sequence, as they stand in a batch: those of positions
// [context - num_tokens, context).
struct Chunk {
  int seq = 0;
  int context = 0;
  int num_tokens = 1;
};

// Runs the chunks as one batch; gives [num_tokens, width] as bits of bf16, 0xFFFF where nothing was
// written. Scratch memory is full of NaN before.
std::vector<uint16_t> Run(const Cache& cache, const CudaFixture& gpu,
                          const std::vector<Chunk>& chunks,
                          DecodeRows rows = DecodeRows::kSingleTokens) {
  const Shape& shape = cache.shape;
  const int width = shape.width();
  std::vector<int32_t> cu_seqlens = {0}, context_lens, block_tables;
  std::vector<uint16_t> q;
  for (const Chunk& chunk : chunks) {
    cu_seqlens.push_back(cu_seqlens.back() + chunk.num_tokens);
    context_lens.push_back(chunk.context);
    const auto table = cache.block_tables.begin() + chunk.seq * cache.max_blocks;
    block_tables.insert(block_tables.end(), table, table + cache.max_blocks);
    const int first_query =
        cache.num_queries - cache.lengths[chunk.seq] + chunk.context - chunk.num_tokens;
    for (int i = 0; i < chunk.num_tokens; ++i) {
      const int query = std::max(0, first_query + i);
      const auto row = cache.queries[chunk.seq].begin() + int64_t{query} * width;
      q.insert(q.end(), row, row + width);
    }
  }
  const int num_tokens = cu_seqlens.back();
  const int num_groups = DecodeGroups(shape.num_kv_heads, shape.heads_per_kv);
  const int num_splits = DecodeSplits(cache.max_blocks, num_groups);
  const DeviceArray<int32_t> device_cu_seqlens(cu_seqlens), device_context_lens(context_lens),
      device_block_tables(block_tables);
  const DeviceArray<uint16_t> device_q(q), out(int64_t{num_tokens} * width);
  const int num_rows =
      rows == DecodeRows::kEveryToken ? num_tokens : static_cast<int>(chunks.size());
  const DeviceArray<float> partials(int64_t{std::min(num_rows, kMaxDecodeRows)} * num_groups *
                                    num_splits *
                                    DecodePartialFloats(shape.heads_per_kv, shape.head_dim));
  const DeviceArray<int32_t> arrivals(std::vector<int32_t>(kMaxDecodeRows * num_groups, 0));
  DecodeAttentionParams params = {
      .q = device_q.data(),
      .q_token_stride = width,
      .q_head_stride = shape.head_dim,
      .out = out.data(),
      .out_token_stride = width,
      .out_head_stride = shape.head_dim,
      .kv = cache.device_memory.data(),
      .kv_dtype = shape.dtype,
      .num_kv_heads = shape.num_kv_heads,
      .heads_per_kv = shape.heads_per_kv,
      .head_dim = shape.head_dim,
      .cu_seqlens = device_cu_seqlens.data(),
      .context_lens = device_context_lens.data(),
      .block_tables = device_block_tables.data(),
      .num_seqs = static_cast<int>(chunks.size()),
      .max_blocks_per_seq = cache.max_blocks,
      .rows = rows,
      .scale = shape.scale(),
      .window = shape.window,
      .max_splits = num_splits,
      .partials = partials.data(),
      .arrivals = arrivals.data(),
  };
  for (int row = 0; row < num_rows; row += kMaxDecodeRows) {
    params.first_row = row;
    params.num_rows = std::min(kMaxDecodeRows, num_rows - row);
    LaunchDecodeAttention(params, gpu.context.num_sms, gpu.context.stream);
  }
  gpu.Synchronize();
  const std::vector<int32_t> left = arrivals.Download();
  REQUIRE(std::all_of(left.begin(), left.end(), [](int32_t count) { return count == 0; }));
  return out.Download();
}

std::vector<Chunk> WholeBatch(const Cache& cache) {
  std::vector<Chunk> chunks;
  for (size_t seq = 0; seq < cache.lengths.size(); ++seq) {
    chunks.push_back({static_cast<int>(seq), cache.lengths[seq]});
  }
  return chunks;
}

// The largest distance of a row from the softmax in double precision, in tolerances. What the
// kernel rounds: probabilities and outputs to 16 bits (half a unit in the last place each); the
// rest is fp32, where a score's error is that of a sum of head_dim products of order 2.
double LargestError(const Cache& cache, int seq, int context, int query, const uint16_t* row) {
  const Shape& shape = cache.shape;
  const double prob_epsilon = shape.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  const int begin = shape.window == 0 ? 0 : std::max(0, context - shape.window);
  const auto to_float = [&](const uint16_t* bits) {
    return ToFloat(shape.dtype, std::span(bits, shape.head_dim));
  };
  const std::vector<float> out = ToFloat(DType::kBF16, std::span(row, shape.width()));
  double largest = 0;
  for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    std::vector<std::vector<float>> keys, values;
    for (int p = begin; p < context; ++p) {
      keys.push_back(to_float(cache.Run(seq, p, kv_head, false)));
      values.push_back(to_float(cache.Run(seq, p, kv_head, true)));
    }
    for (int h = 0; h < shape.heads_per_kv; ++h) {
      const int head = kv_head * shape.heads_per_kv + h;
      const std::vector<float> q = to_float(cache.queries[seq].data() +
                                            int64_t{query} * shape.width() + head * shape.head_dim);
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

void CheckAgainstReference(const Cache& cache, const std::vector<uint16_t>& out) {
  const int width = cache.shape.width();
  for (size_t seq = 0; seq < cache.lengths.size(); ++seq) {
    CAPTURE(seq, cache.lengths[seq]);
    const uint16_t* row = out.data() + seq * width;
    if (cache.lengths[seq] == 0) {
      REQUIRE(std::all_of(row, row + width, [](uint16_t bits) { return bits == 0; }));
    } else {
      REQUIRE(LargestError(cache, static_cast<int>(seq), cache.lengths[seq], 0, row) <= 1);
    }
  }
}

bool SameRow(const uint16_t* a, const uint16_t* b, int width) {
  return std::memcmp(a, b, width * sizeof(uint16_t)) == 0;
}

}  // namespace

TEST_CASE("decode attention equals the double-precision softmax") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture gpu;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const int head_dim : {64, 128}) {
      for (const int heads_per_kv : {1, 3, 4, 6, 7, 8, 12}) {
        const Shape shape = {2, heads_per_kv, head_dim, 0, dtype};
        CAPTURE(head_dim, heads_per_kv, static_cast<int>(dtype));
        const Cache cache(shape, {0, 1, 15, 16, 17, 255, 256, 257, 0, 1000, 33}, rng);
        CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
      }
    }
  }
}

TEST_CASE("decode attention over long contexts and many heads") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  const CudaFixture gpu;
  const Shape shapes[] = {{1, 4, 128, 0, DType::kBF16}, {2, 6, 64, 0, DType::kF16}};
  for (const Shape& shape : shapes) {
    CAPTURE(shape.num_kv_heads, shape.head_dim);
    const Cache cache(shape, {5000, 40000, 3}, rng);
    CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
  }
  const Cache mha({32, 1, 128, 0, DType::kBF16}, {700, 4100}, rng);
  CheckAgainstReference(mha, Run(mha, gpu, WholeBatch(mha)));
  const Cache gqa({8, 4, 128, 0, DType::kBF16}, {700, 9001}, rng);
  CheckAgainstReference(gqa, Run(gqa, gpu, WholeBatch(gqa)));
}

TEST_CASE("decode attention with a sliding window") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 2);
  const CudaFixture gpu;
  for (const int window : {1, 15, 16, 17, 100, 1000, 4096}) {
    CAPTURE(window);
    const Cache cache({2, 4, 64, window, DType::kBF16}, {1, 16, 17, 100, 101, 999, 3000}, rng);
    CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
  }
}

TEST_CASE("decode attention equals the CPU backend") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 3);
  const CudaFixture gpu;
  const auto cpu = MakeCpuOps({});
  for (const Shape& shape : {Shape{2, 7, 64, 0, DType::kBF16}, Shape{8, 4, 128, 50, DType::kF16}}) {
    Cache cache(shape, {1, 40, 300, 2048}, rng);
    const int num_seqs = static_cast<int>(cache.lengths.size());
    const std::vector<uint16_t> out = Run(cache, gpu, WholeBatch(cache));
    std::vector<float> q, expected(int64_t{num_seqs} * shape.width());
    std::vector<int32_t> positions, cu_seqlens = {0};
    for (int seq = 0; seq < num_seqs; ++seq) {
      const std::vector<float> row = ToFloat(shape.dtype, cache.queries[seq]);
      q.insert(q.end(), row.begin(), row.end());
      positions.push_back(cache.lengths[seq] - 1);
      cu_seqlens.push_back(seq + 1);
    }
    SequenceBatch batch = {.num_seqs = num_seqs,
                           .num_tokens = num_seqs,
                           .max_blocks_per_seq = cache.max_blocks,
                           .positions = positions.data(),
                           .cu_seqlens = cu_seqlens.data(),
                           .context_lens = cache.lengths.data(),
                           .block_tables = cache.block_tables.data()};
    const auto view = [&](std::vector<float>& x) {
      return TensorView::Contiguous(x.data(), DType::kF32, Device::kCpu,
                                    {num_seqs, shape.num_heads(), shape.head_dim});
    };
    cpu->Attention({.batch = batch,
                    .q = view(q),
                    .kv = {.data = cache.memory.data(), .layout = cache.layout},
                    .scale = shape.scale(),
                    .sliding_window = shape.window,
                    .out = view(expected)});
    // The GPU rounds the probabilities that weigh values of order 5, and its output, to bf16.
    const std::vector<float> actual = ToFloat(DType::kBF16, out);
    for (size_t i = 0; i < actual.size(); ++i) {
      REQUIRE(std::abs(actual[i] - expected[i]) <= 0x1p-8 * (5 + std::abs(expected[i])));
    }
  }
}

TEST_CASE("a row's bits do not depend on its batch") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 4);
  const CudaFixture gpu;
  const Shape shapes[] = {{8, 4, 128, 0, DType::kBF16},
                          {2, 7, 64, 0, DType::kF16},
                          {4, 1, 128, 300, DType::kBF16},
                          {2, 12, 64, 0, DType::kBF16}};
  for (const Shape& shape : shapes) {
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.window);
    const int width = shape.width();
    const Cache cache(shape, {1, 16, 250, 513, 4097, 9000, 2000, 77}, rng);
    std::vector<std::vector<uint16_t>> alone;
    for (const Chunk& chunk : WholeBatch(cache)) alone.push_back(Run(cache, gpu, {chunk}));
    for (int trial = 0; trial < 6; ++trial) {
      // Sequences many times over, in any order, with padding between; more than one launch.
      std::vector<Chunk> chunks;
      const int count = trial < 4 ? 1 + static_cast<int>(rng() % 40) : 300;
      for (int i = 0; i < count; ++i) {
        const int seq = static_cast<int>(rng() % cache.lengths.size());
        chunks.push_back({seq, rng() % 8 == 0 ? 0 : cache.lengths[seq]});
      }
      const std::vector<uint16_t> out = Run(cache, gpu, chunks);
      const std::vector<uint16_t> zeros(width, 0);
      for (int i = 0; i < count; ++i) {
        CAPTURE(trial, i, chunks[i].context);
        const uint16_t* expected =
            chunks[i].context == 0 ? zeros.data() : alone[chunks[i].seq].data();
        REQUIRE(SameRow(out.data() + int64_t{i} * width, expected, width));
      }
    }
  }
}

TEST_CASE("a token of a chunk has the bits of a lone token") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 5);
  const CudaFixture gpu;
  constexpr int kQueries = 400;
  for (const Shape& shape : {Shape{2, 4, 128, 0, DType::kBF16}, Shape{1, 3, 64, 90, DType::kF16}}) {
    const int width = shape.width();
    const Cache cache(shape, {400, 1300, 5000}, rng, kQueries);
    const std::vector<Chunk> chunks = {{0, 400, 400}, {1, 1290, 1}, {2, 5000, 33}};
    const std::vector<uint16_t> all = Run(cache, gpu, chunks, DecodeRows::kEveryToken);
    int64_t token = 0;
    for (const Chunk& chunk : chunks) {
      for (int i = 0; i < chunk.num_tokens; ++i, ++token) {
        const int context = chunk.context - chunk.num_tokens + i + 1;
        CAPTURE(chunk.seq, context);
        const int query = kQueries - cache.lengths[chunk.seq] + context - 1;
        if (i % 13 == 0) {
          REQUIRE(LargestError(cache, chunk.seq, context, query, all.data() + token * width) <= 1);
        }
        if (i % 5 != 0) continue;
        const std::vector<uint16_t> alone = Run(cache, gpu, {{chunk.seq, context, 1}});
        REQUIRE(SameRow(all.data() + token * width, alone.data(), width));
      }
    }
    // Rows of single tokens leave chunks alone.
    const std::vector<uint16_t> single = Run(cache, gpu, chunks);
    for (int64_t i = 0; i < static_cast<int64_t>(single.size()); ++i) {
      const bool is_single = i / width == 400;
      REQUIRE(single[i] == (is_single ? all[i] : 0xFFFF));
    }
  }
}

}  // namespace gloam::cuda
