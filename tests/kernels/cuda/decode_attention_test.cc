// Decode attention on the GPU: against a double-precision softmax over the rounded inputs and
// against the CPU backend, and bit for bit against itself in other batches.
#include "kernels/cuda/decode/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/paged_kv.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/paged_cache.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 20261125;

// Some last queries of a sequence, as they stand in a batch: those of positions
// [context - num_tokens, context).
struct Chunk {
  int seq = 0;
  int context = 0;
  int num_tokens = 1;
};

// Runs the chunks as one batch; gives [num_tokens, width] as bits of bf16, 0xFFFF where nothing was
// written. Scratch memory is full of NaN before.
std::vector<uint16_t> Run(const PagedCache& cache, const CudaFixture& gpu,
                          const std::vector<Chunk>& chunks,
                          DecodeRows rows = DecodeRows::kSingleTokens,
                          int max_heads_per_unit = kMaxDecodeHeads, bool balanced = false) {
  const AttentionShape& shape = cache.shape;
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
  const int heads_per_unit = std::min(max_heads_per_unit, shape.heads_per_kv);
  const int num_groups = DecodeGroups(shape.num_kv_heads, shape.heads_per_kv, heads_per_unit);
  const int num_splits = DecodeSplits(cache.max_blocks, num_groups);
  const DeviceArray<int32_t> device_cu_seqlens(cu_seqlens), device_context_lens(context_lens),
      device_block_tables(block_tables);
  const DeviceArray<uint16_t> device_q(q), out(int64_t{num_tokens} * width);
  const int num_rows =
      rows == DecodeRows::kEveryToken ? num_tokens : static_cast<int>(chunks.size());
  const int64_t num_partials =
      int64_t{std::min(num_rows, kMaxDecodeRows)} * num_groups * num_splits + gpu.context.num_sms;
  const DeviceArray<float> partials(num_partials *
                                    DecodePartialFloats(heads_per_unit, shape.head_dim));
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
      .heads_per_unit = heads_per_unit,
      .cu_seqlens = device_cu_seqlens.data(),
      .context_lens = device_context_lens.data(),
      .block_tables = device_block_tables.data(),
      .num_seqs = static_cast<int>(chunks.size()),
      .max_blocks_per_seq = cache.max_blocks,
      .rows = rows,
      .scale = shape.scale(),
      .window = shape.window,
      .balanced = balanced,
      .max_splits = num_splits,
      .partials = partials.data(),
      .arrivals = arrivals.data(),
  };
  for (int row = 0; row < num_rows; row += kMaxDecodeRows) {
    params.first_row = row;
    params.num_rows = std::min(kMaxDecodeRows, num_rows - row);
    LaunchDecodeAttention(
        params, {gpu.context.num_sms, gpu.context.compute_capability, gpu.context.stream});
  }
  gpu.Synchronize();
  const std::vector<int32_t> left = arrivals.Download();
  REQUIRE(std::all_of(left.begin(), left.end(), [](int32_t count) { return count == 0; }));
  return out.Download();
}

std::vector<Chunk> WholeBatch(const PagedCache& cache) {
  std::vector<Chunk> chunks;
  for (size_t seq = 0; seq < cache.lengths.size(); ++seq) {
    chunks.push_back({static_cast<int>(seq), cache.lengths[seq]});
  }
  return chunks;
}

void CheckAgainstReference(const PagedCache& cache, const std::vector<uint16_t>& out) {
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
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    for (const int head_dim : {64, 128}) {
      for (const int heads_per_kv : Sized({1, 3, 4, 6, 7, 8, 12}, {1, 4, 7, 12})) {
        const AttentionShape shape = {2, heads_per_kv, head_dim, 0, dtype};
        CAPTURE(head_dim, heads_per_kv, static_cast<int>(dtype));
        const PagedCache cache(shape, {0, 1, 15, 16, 17, 255, 256, 257, 0, Sized(1000, 530), 33},
                               rng);
        CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
        // As where shared memory is small.
        const int heads = DecodeHeads(/*compute_capability=*/89);
        CheckAgainstReference(cache,
                              Run(cache, gpu, WholeBatch(cache), DecodeRows::kSingleTokens, heads));
      }
    }
  }
}

TEST_CASE("decode attention over long contexts and many heads") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  const CudaFixture gpu;
  const AttentionShape shapes[] = {{1, 4, 128, 0, DType::kBF16},
                                   {2, 6, 64, 0, DType::kF16},
                                   {1, 8, 128, 0, DType::kF8E4M3},
                                   {2, 1, 64, 0, DType::kF8E4M3}};
  for (const AttentionShape& shape : shapes) {
    CAPTURE(shape.num_kv_heads, shape.head_dim);
    const PagedCache cache(shape, Sized({5000, 40000, 3}, {700, 2200, 3}), rng);
    CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
  }
  const PagedCache mha({32, 1, 128, 0, DType::kBF16}, Sized({700, 4100}, {40, 300}), rng);
  CheckAgainstReference(mha, Run(mha, gpu, WholeBatch(mha)));
  const PagedCache gqa({8, 4, 128, 0, DType::kBF16}, Sized({700, 9001}, {40, 1100}), rng);
  CheckAgainstReference(gqa, Run(gqa, gpu, WholeBatch(gqa)));
  const PagedCache fp8({8, 4, 128, 0, DType::kF8E4M3}, Sized({700, 9001}, {40, 1100}), rng);
  CheckAgainstReference(fp8, Run(fp8, gpu, WholeBatch(fp8)));
}

TEST_CASE("decode attention balanced over a batch") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 7);
  const CudaFixture gpu;
  for (const AttentionShape& shape :
       {AttentionShape{8, 4, 128, 0, DType::kBF16}, AttentionShape{2, 3, 64, 300, DType::kF16},
        AttentionShape{8, 4, 128, 0, DType::kF8E4M3},
        AttentionShape{2, 3, 64, 300, DType::kF8E4M3}}) {
    CAPTURE(shape.num_kv_heads, shape.head_dim);
    // From pieces as short as may be to rows in one piece.
    for (const int num_rows : Sized({1, 14, 20, 62, 70, 200}, {1, 3, 9})) {
      CAPTURE(num_rows);
      std::vector<int> lengths = {Sized(6000, 600), 0};
      const int longest = Sized(900, 100);
      for (int i = 0; i < num_rows; ++i) lengths.push_back(1 + static_cast<int>(rng() % longest));
      const PagedCache cache(shape, lengths, rng);
      CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache), DecodeRows::kSingleTokens,
                                       kMaxDecodeHeads, /*balanced=*/true));
    }
  }
  // Long ones among short ones, and fewer blocks than SMs.
  for (const int longest : {Sized(20000, 2000), 300}) {
    CAPTURE(longest);
    std::vector<int> lengths = {0, longest};
    for (int i = 0; i < 180; ++i) lengths.push_back(longest == 300 ? i % 40 / 39 : i % 18);
    lengths.insert(lengths.end(), {longest, 0, 0});
    const PagedCache cache({1, 4, 128, 0, DType::kBF16}, lengths, rng);
    CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache), DecodeRows::kSingleTokens,
                                     kMaxDecodeHeads, /*balanced=*/true));
  }
}

TEST_CASE("decode attention with a sliding window") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 2);
  const CudaFixture gpu;
  for (const int window : {1, 15, 16, 17, 100, 1000, 4096}) {
    CAPTURE(window);
    for (const AttentionShape& shape : {AttentionShape{2, 4, 64, window, DType::kBF16},
                                        AttentionShape{2, 4, 64, window, DType::kF8E4M3},
                                        AttentionShape{1, 3, 128, window, DType::kF8E4M3}}) {
      const PagedCache cache(shape, {1, 16, 17, 100, 101, 999, Sized(3000, 1100)}, rng);
      CheckAgainstReference(cache, Run(cache, gpu, WholeBatch(cache)));
    }
  }
}

TEST_CASE("decode attention equals the CPU backend") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 3);
  const CudaFixture gpu;
  const auto cpu = MakeCpuOps({});
  for (const AttentionShape& shape :
       {AttentionShape{2, 7, 64, 0, DType::kBF16}, AttentionShape{8, 4, 128, 50, DType::kF16},
        AttentionShape{2, 7, 64, 50, DType::kF8E4M3},
        AttentionShape{8, 4, 128, 0, DType::kF8E4M3}}) {
    const PagedCache cache(shape, {1, 40, 300, 2048}, rng);
    const int num_seqs = static_cast<int>(cache.lengths.size());
    const std::vector<uint16_t> out = Run(cache, gpu, WholeBatch(cache));
    std::vector<float> q, expected(int64_t{num_seqs} * shape.width());
    std::vector<int32_t> positions, cu_seqlens = {0};
    for (int seq = 0; seq < num_seqs; ++seq) {
      const std::vector<float> row = ToFloat(cache.query_dtype(), cache.queries[seq]);
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
    std::vector<uint16_t> memory = cache.Widened();
    KvLayout layout = cache.layout;
    layout.dtype = cache.query_dtype();
    cpu->Attention({.batch = batch,
                    .q = view(q),
                    .kv = {.data = memory.data(), .layout = layout},
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
  const AttentionShape shapes[] = {{Sized(8, 1), 4, 128, 0, DType::kBF16},
                                   {2, 7, 64, 0, DType::kF16},
                                   {Sized(4, 1), 1, 128, Sized(300, 100), DType::kBF16},
                                   {2, 12, 64, 0, DType::kBF16},
                                   {Sized(8, 1), 4, 128, 0, DType::kF8E4M3},
                                   {2, 7, 64, Sized(300, 100), DType::kF8E4M3}};
  for (const AttentionShape& shape : shapes) {
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.window);
    const int width = shape.width();
    const PagedCache cache(
        shape, Sized({1, 16, 250, 513, 4097, 9000, 2000, 77}, {1, 16, 40, 290, 77}), rng);
    std::vector<std::vector<uint16_t>> alone;
    for (const Chunk& chunk : WholeBatch(cache)) alone.push_back(Run(cache, gpu, {chunk}));
    const int num_trials = Sized(6, shape.num_kv_heads == 1 ? 5 : 4);
    for (int trial = 0; trial < num_trials; ++trial) {
      // Sequences many times over, in any order, with padding between; more than one launch.
      std::vector<Chunk> chunks;
      const int count = trial < 4 ? 1 + static_cast<int>(rng() % Sized(40, 12)) : 300;
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
  const int num_queries = Sized(400, 70);
  for (const AttentionShape& shape :
       {AttentionShape{2, 4, 128, 0, DType::kBF16}, AttentionShape{1, 3, 64, 90, DType::kF16},
        AttentionShape{2, 4, 128, 0, DType::kF8E4M3}}) {
    const int width = shape.width();
    const int longest = Sized(5000, 600);
    const PagedCache cache(shape, {num_queries, Sized(1300, 310), longest}, rng, num_queries);
    const std::vector<Chunk> chunks = {
        {0, num_queries, num_queries}, {1, cache.lengths[1] - 10, 1}, {2, longest, Sized(33, 9)}};
    const std::vector<uint16_t> all = Run(cache, gpu, chunks, DecodeRows::kEveryToken);
    int64_t token = 0;
    for (const Chunk& chunk : chunks) {
      for (int i = 0; i < chunk.num_tokens; ++i, ++token) {
        const int context = chunk.context - chunk.num_tokens + i + 1;
        CAPTURE(chunk.seq, context);
        const int query = num_queries - cache.lengths[chunk.seq] + context - 1;
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
      const bool is_single = i / width == num_queries;
      REQUIRE(single[i] == (is_single ? all[i] : 0xFFFF));
    }
  }
}

}  // namespace gloam::cuda
