// The attention backend on the GPU: chunks and single tokens in one batch, in both modes.
#include "kernels/attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"
#include "tests/kernels/cuda/paged_cache.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 20261125;

// Tokens [begin, end) of a sequence; none of padding.
struct Chunk {
  int seq = 0;
  int begin = 0;
  int end = 0;
  bool is_padding = false;
};

// One forward pass's attention; the result of chunk i is out[i], bits of bf16.
std::vector<std::vector<uint16_t>> Run(const PagedCache& cache, const CudaFixture& gpu,
                                       AttentionBackend& backend,
                                       const std::vector<Chunk>& chunks) {
  const AttentionShape& shape = cache.shape;
  const int width = shape.width();
  std::vector<int32_t> positions, cu_seqlens = {0}, context_lens, block_tables;
  std::vector<uint16_t> q;
  for (const Chunk& chunk : chunks) {
    for (int p = chunk.begin; p < chunk.end; ++p) positions.push_back(p);
    cu_seqlens.push_back(cu_seqlens.back() + chunk.end - chunk.begin);
    context_lens.push_back(chunk.is_padding ? 0 : chunk.end);
    const auto table = cache.block_tables.begin() + chunk.seq * cache.max_blocks;
    block_tables.insert(block_tables.end(), table, table + cache.max_blocks);
    const auto row = cache.queries[chunk.seq].begin();
    q.insert(q.end(), row + int64_t{chunk.begin} * width, row + int64_t{chunk.end} * width);
  }
  const int num_tokens = cu_seqlens.back();
  const DeviceArray<int32_t> device_positions(positions), device_cu_seqlens(cu_seqlens),
      device_context_lens(context_lens), device_block_tables(block_tables);
  const DeviceArray<uint16_t> device_q(q), out(int64_t{num_tokens} * width);
  const SequenceBatch batch = {.num_seqs = static_cast<int>(chunks.size()),
                               .num_tokens = num_tokens,
                               .max_blocks_per_seq = cache.max_blocks,
                               .positions = device_positions.data(),
                               .cu_seqlens = device_cu_seqlens.data(),
                               .context_lens = device_context_lens.data(),
                               .block_tables = device_block_tables.data(),
                               .host_cu_seqlens = cu_seqlens.data(),
                               .host_context_lens = context_lens.data()};
  const auto view = [&](uint16_t* data, DType dtype) {
    return TensorView::Contiguous(data, dtype, Device::kCuda,
                                  {num_tokens, shape.num_heads(), shape.head_dim});
  };
  backend.Plan({.batch = batch,
                .kv = cache.layout,
                .num_heads = shape.num_heads(),
                .sliding_window = shape.window});
  backend.Attention({.batch = batch,
                     .q = view(device_q.data(), cache.query_dtype()),
                     .kv = cache.device_view(),
                     .scale = shape.scale(),
                     .sliding_window = shape.window,
                     .out = view(out.data(), DType::kBF16)});
  gpu.Synchronize();
  const std::vector<uint16_t> bits = out.Download();
  std::vector<std::vector<uint16_t>> results;
  for (size_t i = 0; i < chunks.size(); ++i) {
    results.emplace_back(bits.begin() + int64_t{cu_seqlens[i]} * width,
                         bits.begin() + int64_t{cu_seqlens[i + 1]} * width);
  }
  return results;
}

std::unique_ptr<AttentionBackend> MakeBackend(const CudaFixture& gpu, const AttentionShape& shape) {
  auto backend = MakeAttentionBackend(gpu.context);
  REQUIRE(backend
              ->Reserve({.max_tokens = 4096,
                         .max_seqs = 64,
                         .max_context = 4096,
                         .num_heads = shape.num_heads(),
                         .num_kv_heads = shape.num_kv_heads,
                         .head_dim = shape.head_dim,
                         .kv_dtype = shape.dtype})
              .ok());
  return backend;
}

const AttentionShape kShapes[] = {
    {2, 4, 128, 0, DType::kBF16},   {2, 7, 64, 0, DType::kF16},
    {1, 3, 64, 100, DType::kBF16},  {Sized(4, 2), 1, 128, 0, DType::kF16},
    {2, 4, 128, 0, DType::kF8E4M3}, {1, 3, 64, 100, DType::kF8E4M3}};

}  // namespace

TEST_CASE("chunks, single tokens and padding in one batch") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed);
  const CudaFixture gpu;
  for (const AttentionShape& shape : kShapes) {
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.window);
    const int shorter = Sized(700, 200), longest = Sized(1200, 360);
    const PagedCache cache(shape, {shorter, 33, 16, longest, 1}, rng, longest);
    const auto backend = MakeBackend(gpu, shape);
    const std::vector<std::vector<Chunk>> batches = {
        {{0, 0, shorter}, {1, 32, 33}, {2, 3, 16}, {3, longest - 1, longest}, {4, 0, 1}},
        {{3, longest - longest / 3, longest}, {0, shorter - 100, shorter - 98}},
        {{4, 0, 1}},
        {{0, shorter - 1, shorter}, {4, 0, 1, true}, {3, longest - 100, longest - 99}},
        {{1, 0, 33}, {2, 15, 16}}};
    for (const std::vector<Chunk>& chunks : batches) {
      const auto results = Run(cache, gpu, *backend, chunks);
      for (size_t i = 0; i < chunks.size(); ++i) {
        const Chunk& chunk = chunks[i];
        for (int p = chunk.begin; p < chunk.end; p += p + 40 < chunk.end ? 37 : 1) {
          CAPTURE(i, chunk.seq, p);
          const uint16_t* row = results[i].data() + int64_t{p - chunk.begin} * shape.width();
          if (chunk.is_padding) {
            REQUIRE(std::all_of(row, row + shape.width(), [](uint16_t bits) { return bits == 0; }));
          } else {
            const bool is_prefill = chunk.end - chunk.begin > 1;
            REQUIRE(LargestError(cache, chunk.seq, p + 1, p, row, is_prefill) <= 1);
          }
        }
      }
    }
  }
}

TEST_CASE("batch-invariant attention does not depend on chunks or neighbours") {
  CAPTURE(kSeed);
  std::mt19937 rng(kSeed + 1);
  const CudaFixture gpu({.batch_invariant = true});
  for (const AttentionShape& shape : kShapes) {
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, shape.window);
    const int width = shape.width();
    const std::vector<int> lengths = Sized({300, 65, 900}, {24, 17, 300});
    const std::vector<int> begins = Sized({0, 0, 0}, {0, 0, 288});  // what is before is cached
    const PagedCache cache(shape, lengths, rng, lengths[2]);
    const auto backend = MakeBackend(gpu, shape);
    std::vector<std::vector<uint16_t>> expected;
    for (int seq = 0; seq < 3; ++seq) {
      expected.push_back(Run(cache, gpu, *backend, {{seq, begins[seq], lengths[seq]}})[0]);
      const int last = lengths[seq] - 1;
      REQUIRE(LargestError(cache, seq, last + 1, last,
                           expected.back().data() + int64_t{last - begins[seq]} * width) <= 1);
    }
    for (int trial = 0; trial < Sized(4, 2); ++trial) {
      std::vector<int> done = begins;
      while (done != lengths) {
        std::vector<Chunk> chunks;
        for (int seq = 0; seq < 3; ++seq) {
          const int left = lengths[seq] - done[seq];
          if (left == 0 || rng() % 4 == 0) continue;
          const int sizes[] = {1, 2, 17, 64, 200, left};
          const int size = std::min(left, sizes[rng() % 6]);
          chunks.push_back({seq, done[seq], done[seq] + size});
          done[seq] += size;
        }
        if (chunks.empty()) continue;
        std::shuffle(chunks.begin(), chunks.end(), rng);
        const auto results = Run(cache, gpu, *backend, chunks);
        for (size_t i = 0; i < chunks.size(); ++i) {
          CAPTURE(trial, chunks[i].seq, chunks[i].begin, chunks[i].end);
          const Chunk& chunk = chunks[i];
          const int64_t first = int64_t{chunk.begin - begins[chunk.seq]} * width;
          REQUIRE(std::memcmp(results[i].data(), expected[chunk.seq].data() + first,
                              results[i].size() * sizeof(uint16_t)) == 0);
        }
      }
    }
  }
}

}  // namespace gloam::cuda
