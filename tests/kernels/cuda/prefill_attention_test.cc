// Prefill attention on the GPU against a double-precision reference over the same rounded inputs,
// with FA3 for what the plan gives it (where the GPU has it) and by FA2 alone.
#include "kernels/cuda/prefill/prefill_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "catch2/catch.hpp"
#include "tests/kernels/cuda/cache_values.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 20261125;

struct Shape {
  DType dtype = DType::kBF16;
  int head_dim = 128;
  int num_kv_heads = 2;
  int group = 1;
  int window = 0;

  int num_heads() const { return num_kv_heads * group; }
};

// Tokens of this step, the last of `context` tokens.
struct Seq {
  int tokens = 1;
  int context = 1;
};

// A step over a pool of NaN in which the sequences' keys and values lie in random blocks. Entries
// of the block tables that no context reaches name no block.
class Step {
 public:
  Step(const Shape& shape, std::vector<Seq> seqs) : shape_(shape), seqs_(std::move(seqs)) {
    num_blocks_ = 3;
    cu_seqlens_.push_back(0);
    for (const Seq& seq : seqs_) {
      cu_seqlens_.push_back(cu_seqlens_.back() + seq.tokens);
      context_lens_.push_back(seq.context);
      const int blocks = (seq.context + kBlockTokens - 1) / kBlockTokens;
      num_blocks_ += blocks;
      max_blocks_ = std::max(max_blocks_, blocks + 2);
    }
    layout_ = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    std::vector<int32_t> ids(num_blocks_);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(kSeed));
    block_tables_.assign(seqs_.size() * max_blocks_, 0x3FFFFFFF);
    std::vector<float> kv(layout_.block_elements() * num_blocks_, std::nanf(""));
    // As part of a fused QKV matrix: rows have a stride of their own.
    std::vector<float> q(num_tokens() * q_stride(), std::nanf(""));
    int next = 0;
    for (size_t s = 0; s < seqs_.size(); ++s) {
      for (int i = 0; i * kBlockTokens < seqs_[s].context; ++i) {
        block_tables_[s * max_blocks_ + i] = ids[next++];
      }
      std::mt19937 rng(kSeed + s);
      std::uniform_real_distribution<float> uniform(-2, 2);
      const int first = seqs_[s].context - seqs_[s].tokens;
      for (int position = 0; position < seqs_[s].context; ++position) {
        for (int head = 0; head < shape.num_kv_heads; ++head) {
          for (const int part : {0, 1}) {
            float* run = &kv[IndexOf(s, position, head, part)];
            for (int c = 0; c < shape.head_dim; ++c) run[c] = uniform(rng);
          }
        }
        for (int i = 0; i < shape.num_heads() * shape.head_dim; ++i) {
          const float x = 2 * uniform(rng);
          if (position >= first) q[(cu_seqlens_[s] + position - first) * q_stride() + i] = x;
        }
      }
    }
    kv_bytes_ = ToBytes(shape.dtype, kv);
    q_bits_ = RoundTo(q_dtype(), q);
    kv_ = FromBytes(shape.dtype, kv_bytes_);
    q_ = ToFloat(q_dtype(), q_bits_);
  }

  int num_tokens() const { return cu_seqlens_.back(); }
  DType q_dtype() const { return QueryDTypeOf(shape_.dtype); }
  int64_t q_stride() const {
    return int64_t{shape_.num_heads() + 2 * shape_.num_kv_heads} * shape_.head_dim;
  }
  int64_t IndexOf(size_t seq, int position, int head, int key_or_value) const {
    const int64_t block = block_tables_[seq * max_blocks_ + position / kBlockTokens];
    return block * layout_.block_elements() +
           (int64_t{key_or_value} * shape_.num_kv_heads + head) * layout_.head_run_elements() +
           position % kBlockTokens * shape_.head_dim;
  }

  // Plans and runs, twice over, the sequences of more than one token; returns bf16 bits.
  std::vector<uint16_t> Run(const DeviceContext& context) const {
    const DeviceArray<uint8_t> kv(kv_bytes_);
    const DeviceArray<uint16_t> q(q_bits_);
    const DeviceArray<int32_t> tables(block_tables_), cu_seqlens(cu_seqlens_),
        context_lens(context_lens_);
    const int64_t out_size = int64_t{num_tokens()} * shape_.num_heads() * shape_.head_dim;
    const DeviceArray<uint16_t> out(out_size);

    AttentionParams params;
    params.batch = {.num_seqs = static_cast<int>(seqs_.size()),
                    .num_tokens = num_tokens(),
                    .max_blocks_per_seq = max_blocks_,
                    .cu_seqlens = cu_seqlens.data(),
                    .context_lens = context_lens.data(),
                    .block_tables = tables.data(),
                    .host_cu_seqlens = cu_seqlens_.data(),
                    .host_context_lens = context_lens_.data()};
    params.q = TensorView::Contiguous(q.data(), q_dtype(), Device::kCuda,
                                      {num_tokens(), shape_.num_heads(), shape_.head_dim});
    params.q.strides[0] = q_stride();
    params.kv = {.data = kv.data(), .layout = layout_, .num_blocks = num_blocks_};
    params.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    params.sliding_window = shape_.window;
    params.out = TensorView::Contiguous(out.data(), DType::kBF16, Device::kCuda,
                                        {num_tokens(), shape_.num_heads(), shape_.head_dim});

    const std::unique_ptr<PrefillAttention> prefill = PrefillAttention::Make(context);
    REQUIRE(prefill
                ->Reserve({.max_tokens = num_tokens(),
                           .max_seqs = static_cast<int>(seqs_.size()),
                           .max_context = max_blocks_ * kBlockTokens,
                           .num_heads = shape_.num_heads(),
                           .num_kv_heads = shape_.num_kv_heads,
                           .head_dim = shape_.head_dim,
                           .kv_dtype = shape_.dtype})
                .ok());
    std::vector<int> planned;
    for (size_t s = 0; s < seqs_.size(); ++s) {
      if (seqs_[s].tokens > 1) planned.push_back(static_cast<int>(s));
    }
    std::vector<uint16_t> first;
    for (int i = 0; i < 2; ++i) {
      prefill->Plan({.batch = params.batch,
                     .kv = layout_,
                     .num_heads = shape_.num_heads(),
                     .sliding_window = shape_.window},
                    planned);
      prefill->Run(params);
      const std::vector<uint16_t> bits = out.Download();
      if (i == 0) first = bits;
      REQUIRE(std::equal(first.begin(), first.end(), bits.begin(), bits.end()));
    }
    return first;
  }

  // What one row of one head should be, and the sum of probability times |value| per channel, which
  // rounding errors are in proportion to.
  void Expected(size_t seq, int row, int head, std::vector<double>* out,
                std::vector<double>* scale) const {
    const int dim = shape_.head_dim;
    const int position = seqs_[seq].context - seqs_[seq].tokens + row;
    const int begin = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    const float* q = &q_[(cu_seqlens_[seq] + row) * q_stride() + int64_t{head} * dim];
    std::vector<double> p(position + 1);
    double max = -INFINITY, sum = 0;
    for (int i = begin; i <= position; ++i) {
      const float* k = &kv_[IndexOf(seq, i, head / shape_.group, 0)];
      for (int c = 0; c < dim; ++c) p[i] += static_cast<double>(q[c]) * k[c];
      p[i] /= std::sqrt(static_cast<double>(dim));
      max = std::max(max, p[i]);
    }
    for (int i = begin; i <= position; ++i) sum += p[i] = std::exp(p[i] - max);
    out->assign(dim, 0);
    scale->assign(dim, 0);
    for (int i = begin; i <= position; ++i) {
      const float* v = &kv_[IndexOf(seq, i, head / shape_.group, 1)];
      for (int c = 0; c < dim; ++c) {
        (*out)[c] += p[i] / sum * v[c];
        (*scale)[c] += p[i] / sum * std::abs(v[c]);
      }
    }
  }

  // Compares rows (all of short chunks, some of long ones) and that single tokens' rows are as they
  // were.
  void Check(const std::vector<std::vector<uint16_t>>& outputs) const {
    struct Row {
      size_t seq;
      int row;
      int head;
      std::vector<double> expected, scale;
    };
    std::vector<Row> rows;
    for (size_t s = 0; s < seqs_.size(); ++s) {
      const int tokens = seqs_[s].tokens;
      for (int row = 0; row < tokens; ++row) {
        const bool edge = row < 2 || row >= tokens - 2 || row % 64 == 0 || row % 64 == 63;
        if (tokens > 40 && !edge && row % 29 != 0) continue;
        for (int head = 0; head < shape_.num_heads(); ++head) rows.push_back({s, row, head});
      }
    }
    std::atomic<size_t> next = 0;
    std::vector<std::jthread> threads;
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
      threads.emplace_back([&] {
        for (size_t r = next++; r < rows.size(); r = next++) {
          if (seqs_[rows[r].seq].tokens == 1) continue;
          Expected(rows[r].seq, rows[r].row, rows[r].head, &rows[r].expected, &rows[r].scale);
        }
      });
    }
    threads.clear();

    // Probabilities are rounded to the cache's type, outputs (and the parts of split contexts) to
    // bf16; scores and sums are fp32.
    const double bf16_unit = std::exp2(-8);
    const double probability_unit = q_dtype() == DType::kBF16 ? bf16_unit : std::exp2(-11);
    for (const Row& row : rows) {
      const int64_t begin =
          (int64_t{cu_seqlens_[row.seq] + row.row} * shape_.num_heads() + row.head) *
          shape_.head_dim;
      for (size_t i = 0; i < outputs.size(); ++i) {
        const std::span<const uint16_t> bits(&outputs[i][begin], shape_.head_dim);
        if (seqs_[row.seq].tokens == 1) {
          REQUIRE(std::all_of(bits.begin(), bits.end(), [](uint16_t b) { return b == 0xFFFF; }));
          continue;
        }
        const std::vector<float> values = ToFloat(DType::kBF16, bits);
        for (int c = 0; c < shape_.head_dim; ++c) {
          const double tolerance = bf16_unit * std::abs(row.expected[c]) +
                                   (probability_unit + bf16_unit + std::exp2(-14)) * row.scale[c];
          if (std::abs(values[c] - row.expected[c]) <= tolerance) continue;
          INFO("output " << i << " seq " << row.seq << " row " << row.row << " head " << row.head
                         << " channel " << c);
          CHECK(values[c] == Approx(row.expected[c]).margin(tolerance));
          return;
        }
      }
    }
  }

 private:
  Shape shape_;
  std::vector<Seq> seqs_;
  KvLayout layout_;
  int num_blocks_ = 0;
  int max_blocks_ = 0;
  std::vector<int32_t> cu_seqlens_, context_lens_, block_tables_;
  std::vector<uint8_t> kv_bytes_;
  std::vector<uint16_t> q_bits_;
  std::vector<float> kv_, q_;  // the same, widened
};

// The device's own choice of kernels; all of FA2; and FA2 with the shared memory of a smaller GPU.
std::vector<DeviceContext> Contexts(const CudaFixture& fixture) {
  DeviceContext fa2 = fixture.context;
  fa2.compute_capability = 80;
  DeviceContext small = fa2;
  small.max_shared_bytes = 99 * 1024;
  return {fixture.context, fa2, small};
}

void TestStep(const Shape& shape, const std::vector<Seq>& seqs) {
  INFO("dtype " << static_cast<int>(shape.dtype) << " head_dim " << shape.head_dim << " kv heads "
                << shape.num_kv_heads << " group " << shape.group << " window " << shape.window);
  const CudaFixture fixture;
  const Step step(shape, seqs);
  std::vector<std::vector<uint16_t>> outputs;
  for (const DeviceContext& context : Contexts(fixture)) outputs.push_back(step.Run(context));
  step.Check(outputs);
}

// Chunks with and without earlier context among decoding sequences.
const std::vector<Seq> kRagged =
    Sized<Seq>({{1, 40},
                {2, 2},
                {15, 15},
                {1, 1},
                {16, 16},
                {17, 17},
                {2, 39},
                {15, 48},
                {16, 53},
                {17, 200},
                {129, 129},
                {1, 700},
                {129, 166},
                {128, 256},
                {1000, 1000},
                {1000, 1037},
                {1, 16}},
               {{1, 40}, {2, 39}, {17, 17}, {16, 53}, {1, 1}, {193, 200}, {64, 64}});

TEST_CASE("prefill attention: ragged chunks for every group size") {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    for (const int head_dim : {64, 128}) {
      for (const int group : Sized({1, 3, 4, 6, 7, 8}, {1, 3})) {
        TestStep({.dtype = dtype, .head_dim = head_dim, .group = group}, kRagged);
      }
    }
  }
}

TEST_CASE("prefill attention: sliding windows") {
  for (const int head_dim : {64, 128}) {
    for (const int window : Sized({1, 16, 100, 513}, {16, 100})) {
      TestStep({.head_dim = head_dim, .group = Sized(4, 2), .window = window}, kRagged);
    }
  }
  for (const DType dtype : {DType::kF16, DType::kF8E4M3}) {
    TestStep({.dtype = dtype, .group = Sized(7, 3), .window = Sized(250, 90)}, kRagged);
  }
}

TEST_CASE("prefill attention: chunks deep in a context") {
  const Seq deep = Sized(Seq{512, 5512}, Seq{130, 430});
  const int many_heads = Sized(8, 4);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    for (const int head_dim : {64, 128}) {
      TestStep({.dtype = dtype, .head_dim = head_dim, .num_kv_heads = many_heads, .group = 3},
               {{1, 9}, deep});
    }
  }
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    TestStep({.dtype = dtype,
              .num_kv_heads = many_heads,
              .group = Sized(4, 2),
              .window = Sized(1024, 200)},
             {deep, {30, Sized(4000, 500)}});
  }
}

TEST_CASE("prefill attention: few rows deep in a context") {
  const std::vector<Seq> few_rows = Sized<Seq>({{20, 5020}, {1, 30}, {2, 3000}, {5, 17}},
                                               {{20, 420}, {1, 30}, {2, 300}, {5, 17}});
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF8E4M3}) {
    for (const int head_dim : {64, 128}) {
      TestStep({.dtype = dtype, .head_dim = head_dim, .group = 3}, few_rows);
      TestStep({.dtype = dtype, .head_dim = head_dim, .num_kv_heads = Sized(8, 4)}, few_rows);
    }
  }
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    TestStep({.dtype = dtype, .group = 3, .window = Sized(2000, 400)}, few_rows);
  }
}

// Their contexts are more than the workspace of an fp8 cache holds at a time.
TEST_CASE("prefill attention: many long contexts in one step") {
  const int longest = Sized(4000, 600);
  std::vector<Seq> seqs = {{1, longest}};
  for (int i = 0; i < 7; ++i) {
    seqs.push_back({2 + 30 * i, i % 3 == 0 ? longest - 50 * i : longest / 3 + 7 * i});
  }
  for (const int window : {0, Sized(1000, 200)}) {
    for (const int head_dim : {64, 128}) {
      TestStep({.dtype = DType::kF8E4M3, .head_dim = head_dim, .group = 3, .window = window}, seqs);
    }
  }
}

}  // namespace
}  // namespace gloam::cuda
