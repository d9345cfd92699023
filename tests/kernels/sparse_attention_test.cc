// Sparse attention on the CPU: equal to dense attention, bit for bit, when everything is kept;
// against a double-precision reference for given sets; and a row's result does not depend on its
// neighbours, on chunks or on threads.
#include "kernels/sparse_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/float16.h"
#include "kernels/ops.h"
#include "kernels/selector.h"

namespace gloam {
namespace {

struct Shape {
  int num_kv_heads = 2;
  int heads_per_kv = 3;
  int head_dim = 64;
  DType dtype = DType::kBF16;

  int num_heads() const { return num_kv_heads * heads_per_kv; }
};

// Keeps in every KV head the tokens that `Keeps` says, a fixed pseudo-random choice per head.
class HashSelector final : public Selector {
 public:
  explicit HashSelector(int one_in) : one_in_(one_in) {}
  std::string_view name() const override { return "hash"; }
  void Select(SelectParams& params) const override {
    for (int head = 0; head < params.num_heads; ++head) {
      for (int64_t block = 0; block < params.keys.num_blocks; ++block) {
        TokenMask mask = kNoTokens;
        for (int i = 0; i < kBlockTokens; ++i) {
          if (Keeps(params.keys.kv_head, head, block * kBlockTokens + i)) mask |= 1u << i;
        }
        params.masks[head * params.keys.num_blocks + block] &= mask;
      }
    }
  }
  bool Keeps(int kv_head, int head, int64_t token) const {
    uint64_t x = (static_cast<uint64_t>(token) * 64 + head) * 64 + kv_head;
    x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15;
    return (x >> 40) % one_in_ == 0;
  }

 private:
  const uint64_t one_in_;
};

// One sequence of random keys, values and queries in random blocks, with all sidecars.
class Fixture {
 public:
  Fixture(const Shape& shape, int length, uint32_t seed, int num_threads)
      : shape_(shape), length_(length), ops_(MakeCpuOps({.num_threads = num_threads})) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const int num_blocks = (length + kBlockTokens - 1) / kBlockTokens;
    const int pool_blocks = num_blocks + 3;
    kv_.layout = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    kv_.num_blocks = pool_blocks;
    kv_buffer_ = ops_->Allocate(kv_.layout.block_bytes() * pool_blocks).value();
    kv_.data = kv_buffer_.data();
    const int64_t elements = kv_.layout.block_elements() * pool_blocks;
    for (int64_t i = 0; i < elements; ++i) Write(i, normal(rng));

    table_.resize(pool_blocks);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng);

    config_.ranges = config_.mean_values = true;
    config_.block_quant_bits = config_.min_max_quant_bits = config_.max_quant_bits = 4;
    sidecars_.config = &config_;
    sidecars_.num_kv_heads = shape.num_kv_heads;
    sidecars_.num_blocks = kv_.num_blocks;
    for (int kind = 0; kind < kNumSidecarKinds; ++kind) {
      const int64_t bytes = SidecarBytes(static_cast<SidecarKind>(kind), config_, kv_.layout);
      sidecars_.head_bytes[kind] = bytes;
      if (bytes == 0) continue;
      sidecar_buffers_.push_back(ops_->Allocate(bytes * shape.num_kv_heads * pool_blocks).value());
      sidecars_.data[kind] = static_cast<std::byte*>(sidecar_buffers_.back().data());
    }

    queries_.resize(int64_t{length} * shape.num_heads() * shape.head_dim);
    for (float& q : queries_) q = 2 * normal(rng);
    positions_.resize(length);
    std::iota(positions_.begin(), positions_.end(), 0);
    ops_->UpdateSidecars({.batch = Batch(0, length), .kv = kv_, .sidecars = sidecars_});
  }

  // Tokens [begin, end) as one step.
  std::vector<float> Sparse(int begin, int end, const SparsityPolicy& policy,
                            std::vector<SparseHeadStats>* stats = nullptr) {
    std::vector<SparseRow> rows;
    for (int i = begin; i < end; ++i) {
      rows.push_back({.token = i - begin, .policy = &policy, .measure_true_mass = true});
    }
    std::vector<SparseHeadStats> own(rows.size() * shape_.num_kv_heads);
    std::vector<float> out(RowElements() * (end - begin), -1.0f);
    ops_->SparseAttention({.batch = Batch(begin, end),
                           .q = View(queries_.data() + begin * RowElements(), end - begin),
                           .kv = kv_,
                           .sidecars = sidecars_,
                           .scale = scale(),
                           .layer = kDenseLayers,
                           .rows = rows,
                           .stats = own.data(),
                           .out = View(out.data(), end - begin)});
    if (stats != nullptr) *stats = own;
    return out;
  }

  std::vector<float> Dense(int begin, int end) {
    std::vector<float> out(RowElements() * (end - begin), -1.0f);
    ops_->Attention({.batch = Batch(begin, end),
                     .q = View(queries_.data() + begin * RowElements(), end - begin),
                     .kv = kv_,
                     .scale = scale(),
                     .out = View(out.data(), end - begin)});
    return out;
  }

  double Key(int kv_head, int64_t token, int c) const {
    return Read(IndexOf(kv_head, token, c, 0));
  }
  double Value(int kv_head, int64_t token, int c) const {
    return Read(IndexOf(kv_head, token, c, 1));
  }
  double Logit(int position, int kv_head, int head, int64_t token) const {
    const float* q = queries_.data() + position * RowElements() +
                     (kv_head * shape_.heads_per_kv + head) * shape_.head_dim;
    double dot = 0;
    for (int c = 0; c < shape_.head_dim; ++c) dot += q[c] * Key(kv_head, token, c);
    return dot * scale();
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  int64_t RowElements() const { return int64_t{shape_.num_heads()} * shape_.head_dim; }
  const Shape& shape() const { return shape_; }

 private:
  SequenceBatch Batch(int begin, int end) {
    cu_seqlens_ = {0, end - begin};
    context_len_ = end;
    return {.num_seqs = 1,
            .num_tokens = end - begin,
            .max_blocks_per_seq = static_cast<int>(table_.size()),
            .positions = positions_.data() + begin,
            .cu_seqlens = cu_seqlens_.data(),
            .context_lens = &context_len_,
            .block_tables = table_.data()};
  }
  TensorView View(float* data, int rows) const {
    return TensorView::Contiguous(data, DType::kF32, Device::kCpu,
                                  {rows, shape_.num_heads(), shape_.head_dim});
  }
  int64_t IndexOf(int kv_head, int64_t token, int c, int key_or_value) const {
    const int64_t block = table_[token / kBlockTokens];
    const int64_t run = (block * 2 + key_or_value) * shape_.num_kv_heads + kv_head;
    return (run * kBlockTokens + token % kBlockTokens) * shape_.head_dim + c;
  }
  void Write(int64_t i, float value) {
    if (shape_.dtype == DType::kF32) {
      static_cast<float*>(kv_.data)[i] = value;
    } else if (shape_.dtype == DType::kF16) {
      static_cast<uint16_t*>(kv_.data)[i] = F32ToF16(value);
    } else {
      static_cast<uint16_t*>(kv_.data)[i] =
          static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    }
  }
  double Read(int64_t i) const {
    if (shape_.dtype == DType::kF32) return static_cast<float*>(kv_.data)[i];
    const uint16_t bits = static_cast<uint16_t*>(kv_.data)[i];
    return shape_.dtype == DType::kF16 ? F16ToF32(bits) : BF16ToF32(bits);
  }

  const Shape shape_;
  const int length_;
  std::unique_ptr<Ops> ops_;
  Buffer kv_buffer_;
  KvLayerView kv_;
  SidecarConfig config_;
  std::vector<Buffer> sidecar_buffers_;
  SidecarLayerView sidecars_;
  std::vector<int32_t> table_, positions_, cu_seqlens_;
  int32_t context_len_ = 0;
  std::vector<float> queries_;
};

SparsityPolicy PolicyWith(const char* selector) {
  SparsityPolicy policy;
  policy.selector.selector = FindSelector(selector);
  REQUIRE(policy.selector.selector != nullptr);
  policy.selector.numbers.resize(policy.selector.selector->number_keys().size(), 0.0);
  return policy;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const Shape kShapes[] = {{2, 3, 64, DType::kBF16}, {1, 1, 128, DType::kF16},
                         {2, 7, 64, DType::kF16},  {1, 6, 128, DType::kBF16},
                         {3, 4, 80, DType::kF32},  {1, 8, 64, DType::kBF16},
                         {1, 12, 64, DType::kBF16}};

TEST_CASE("With everything kept, sparse attention is dense attention, bit for bit") {
  for (const Shape& shape : kShapes) {
    for (const int length : {1, 15, 16, 17, 33, 500, 513, 1200}) {
      CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, length);
      Fixture fixture(shape, length, 7 + length, 2);
      const std::vector<float> dense = fixture.Dense(length - 1, length);
      SparsityPolicy policy = PolicyWith("none");
      CHECK(SameBits(fixture.Sparse(length - 1, length, policy), dense));
      policy.pruner = {.type = PrunerType::kTopP, .threshold = 1.0f};
      for (const EstimatorType type : {EstimatorType::kNone, EstimatorType::kMinMaxQuant,
                                       EstimatorType::kMaxQuant, EstimatorType::kBlockQuant}) {
        policy.estimator.type = type;
        policy.pruner.share_group = type == EstimatorType::kBlockQuant;
        policy.tail = policy.pruner.share_group ? TailType::kBlockMean : TailType::kNone;
        std::vector<SparseHeadStats> stats;
        CHECK(SameBits(fixture.Sparse(length - 1, length, policy, &stats), dense));
        CHECK(stats[0].loaded == length);
        CHECK(stats[0].kept == Approx(length));
        CHECK(stats[0].true_mass == Approx(1.0));
      }
    }
  }
}

// Attention over the tokens of `keeps`, in double precision, with the mass and mean values of
// `tail` blocks of the others added.
std::vector<double> Reference(const Fixture& fixture, int position, int kv_head, int head,
                              const std::vector<bool>& keeps, bool tail) {
  const int dim = fixture.shape().head_dim;
  std::vector<double> out(dim, 0.0);
  double sum = 0;
  double max = -1e300;
  for (int t = 0; t <= position; ++t) {
    max = std::max(max, fixture.Logit(position, kv_head, head, t));
  }
  for (int t = 0; t <= position; ++t) {
    const double weight = std::exp(fixture.Logit(position, kv_head, head, t) - max);
    if (keeps[t]) {
      sum += weight;
      for (int c = 0; c < dim; ++c) out[c] += weight * fixture.Value(kv_head, t, c);
    } else if (tail) {
      sum += weight;
      const int first = t / kBlockTokens * kBlockTokens;
      for (int c = 0; c < dim; ++c) {
        double mean = 0;
        for (int i = 0; i < kBlockTokens; ++i) mean += fixture.Value(kv_head, first + i, c);
        out[c] += weight * mean / kBlockTokens;
      }
    }
  }
  for (double& x : out) x /= sum;
  return out;
}

TEST_CASE("Given sets: the group's union is read, each head attends to its own or to the union") {
  const HashSelector selector(9);
  for (const Shape& shape : kShapes) {
    for (const int length : {1, 40, 800}) {
      for (const auto& [share, pruner] : {std::pair{false, PrunerType::kNone},
                                          {true, PrunerType::kNone},
                                          {false, PrunerType::kTopP},
                                          {true, PrunerType::kTopP}}) {
        CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim, length, share, pruner);
        Fixture fixture(shape, length, 100 + length, 2);
        SparsityPolicy policy;
        policy.selector.selector = &selector;
        policy.pruner = {.type = pruner, .threshold = 1.0f, .share_group = share};
        policy.sink_tokens = 5;
        policy.recent_tokens = 19;
        const int position = length - 1;
        const int open_begin = position / kBlockTokens * kBlockTokens;
        std::vector<SparseHeadStats> stats;
        const std::vector<float> out = fixture.Sparse(position, length, policy, &stats);
        for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
          std::vector<std::vector<bool>> keeps(shape.heads_per_kv, std::vector<bool>(length));
          std::vector<bool> loaded(length);
          int num_kept = 0;
          for (int head = 0; head < shape.heads_per_kv; ++head) {
            for (int t = 0; t < length; ++t) {
              keeps[head][t] =
                  t >= open_begin || t < 5 || t >= length - 19 || selector.Keeps(kv_head, head, t);
              num_kept += keeps[head][t];
              if (keeps[head][t]) loaded[t] = true;
            }
          }
          CHECK(stats[kv_head].context == length);
          const auto num_loaded = std::count(loaded.begin(), loaded.end(), true);
          // A pruner with shared sets chooses from the candidates of all heads, here all of them.
          if (share && pruner == PrunerType::kTopP) {
            num_kept = static_cast<int>(num_loaded) * shape.heads_per_kv;
          }
          CHECK(stats[kv_head].kept == Approx(static_cast<double>(num_kept) / shape.heads_per_kv));
          CHECK(stats[kv_head].loaded == num_loaded);
          for (int head = 0; head < shape.heads_per_kv; ++head) {
            const std::vector<double> expected =
                Reference(fixture, position, kv_head, head, share ? loaded : keeps[head], false);
            for (int c = 0; c < shape.head_dim; ++c) {
              const int64_t at = (kv_head * shape.heads_per_kv + head) * shape.head_dim + c;
              CHECK(out[at] == Approx(expected[c]).margin(2e-5));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("The tail's mass goes to the mean values of its blocks") {
  const HashSelector selector(1);  // everything is a candidate
  for (const Shape& shape : kShapes) {
    const int length = 333;
    CAPTURE(shape.num_kv_heads, shape.heads_per_kv, shape.head_dim);
    Fixture fixture(shape, length, 5, 1);
    SparsityPolicy policy;
    policy.selector.selector = &selector;
    policy.pruner = {.type = PrunerType::kThreshold, .threshold = 1.5f};
    policy.tail = TailType::kBlockMean;
    const int position = length - 1;
    const int open_begin = position / kBlockTokens * kBlockTokens;
    const std::vector<float> out = fixture.Sparse(position, length, policy);
    for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
      for (int head = 0; head < shape.heads_per_kv; ++head) {
        double max = -1e300;
        for (int t = 0; t < length; ++t) {
          max = std::max(max, fixture.Logit(position, kv_head, head, t));
        }
        std::vector<bool> keeps(length);
        for (int t = 0; t < length; ++t) {
          keeps[t] = t >= open_begin || fixture.Logit(position, kv_head, head, t) >= max - 1.5;
        }
        const std::vector<double> expected =
            Reference(fixture, position, kv_head, head, keeps, true);
        for (int c = 0; c < shape.head_dim; ++c) {
          const int64_t at = (kv_head * shape.heads_per_kv + head) * shape.head_dim + c;
          // Means are kept in the cache's type.
          CHECK(out[at] == Approx(expected[c]).margin(4e-3));
        }
      }
    }
  }
}

TEST_CASE("A row does not depend on chunks, neighbours or threads") {
  const Shape shape = kShapes[0];
  const int length = 700;
  SparsityPolicy policy = PolicyWith("none");
  policy.estimator.type = EstimatorType::kBlockQuant;
  policy.pruner = {.type = PrunerType::kTopP, .threshold = 0.8f, .share_group = true};
  policy.tail = TailType::kBlockMean;
  Fixture one(shape, length, 3, 1);
  Fixture four(shape, length, 3, 4);
  const int begin = length - 60;
  const std::vector<float> together = four.Sparse(begin, length, policy);
  for (int position = begin; position < length; ++position) {
    const std::vector<float> alone = one.Sparse(position, position + 1, policy);
    const auto from = together.begin() + (position - begin) * one.RowElements();
    CHECK(SameBits(alone, std::vector<float>(from, from + one.RowElements())));
  }
}

TEST_CASE("A smaller p reads less and keeps less of the true mass") {
  Fixture fixture(kShapes[0], 2000, 17, 2);
  SparsityPolicy policy = PolicyWith("none");
  policy.estimator.type = EstimatorType::kBlockQuant;
  int last_loaded = 2001;
  float last_mass = 1.1f;
  for (const float p : {0.99f, 0.9f, 0.7f, 0.5f}) {
    policy.pruner = {.type = PrunerType::kTopP, .threshold = p};
    std::vector<SparseHeadStats> stats;
    fixture.Sparse(1999, 2000, policy, &stats);
    CHECK(stats[0].loaded < last_loaded);
    CHECK(stats[0].true_mass < last_mass);
    CHECK(stats[0].true_mass == Approx(p).margin(0.05));
    last_loaded = stats[0].loaded;
    last_mass = stats[0].true_mass;
  }
}

}  // namespace
}  // namespace gloam
