// Every selector on random caches: what all of them promise, and what each of them selects, against
// oracles in double precision.
#include "kernels/selector.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/sparse/block_scores.h"
#include "kernels/estimate.h"
#include "kernels/float16.h"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 20261123;
constexpr double kNotGiven = std::numeric_limits<double>::quiet_NaN();
constexpr int kNumLabels = 8;

struct Shape {
  DType dtype = DType::kBF16;
  int num_kv_heads = 2;
  int num_heads = 3;  // of a KV head's group
  int head_dim = 32;
  int length = 100;
};

using KeyOf = std::function<float(int64_t token, int channel, std::mt19937& rng)>;

float Normal(std::mt19937& rng) { return std::normal_distribution<float>()(rng); }

// One sequence in randomly placed blocks, with ranges and labels, and a query for its last token.
class Context {
 public:
  Context(const Shape& shape, std::mt19937& rng, const KeyOf& key_of = {})
      : shape_(shape), num_blocks_((shape.length - 1) / kBlockTokens) {
    kv_.layout = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    kv_.num_blocks = num_blocks_ + 3;
    cache_.resize(static_cast<size_t>(kv_.layout.block_bytes() * kv_.num_blocks));
    kv_.data = cache_.data();
    table_.resize(static_cast<size_t>(kv_.num_blocks));
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng);
    for (int64_t token = 0; token < shape.length; ++token) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int c = 0; c < shape.head_dim; ++c) {
          WriteKey(token, head, c, key_of ? key_of(token, c, rng) : Normal(rng));
        }
      }
    }
    queries_.resize(static_cast<size_t>(shape.num_heads * shape.head_dim));
    for (float& q : queries_) q = 2 * Normal(rng);
    MakeSidecars(rng);
  }

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Shape& shape() const { return shape_; }
  int64_t num_blocks() const { return num_blocks_; }
  int num_open() const { return static_cast<int>(shape_.length - num_blocks_ * kBlockTokens); }
  const std::shared_ptr<ChannelTable>& channels() const { return channels_; }
  float query(int head, int channel) const { return queries_[head * shape_.head_dim + channel]; }
  const float* queries() const { return queries_.data(); }

  float Key(int64_t token, int head, int channel) const {
    const int64_t at = KeyIndex(token, head, channel);
    switch (shape_.dtype) {
      case DType::kBF16:
        return FloatFromBf16(reinterpret_cast<const uint16_t*>(cache_.data())[at]);
      case DType::kF16:
        return F16ToF32(reinterpret_cast<const uint16_t*>(cache_.data())[at]);
      default:
        return reinterpret_cast<const float*>(cache_.data())[at];
    }
  }

  KeyBlocks Keys(int kv_head) const {
    KeyBlocks keys;
    keys.kv = kv_;
    keys.sidecars = sidecars_;
    keys.block_table = table_.data();
    keys.num_blocks = num_blocks_;
    keys.kv_head = kv_head;
    return keys;
  }

  // query . key over the channels with include[channel], or all of them.
  double Logit(int64_t token, int kv_head, int head, const std::vector<bool>& include = {}) const {
    double sum = 0;
    for (int c = 0; c < shape_.head_dim; ++c) {
      if (include.empty() || include[c]) {
        sum += static_cast<double>(query(head, c)) * static_cast<double>(Key(token, kv_head, c));
      }
    }
    return sum;
  }

  // Sum of |query| * |key| over the channels: what rounding errors are measured in.
  double Magnitude(int64_t token, int kv_head, int head) const {
    double sum = 0;
    for (int c = 0; c < shape_.head_dim; ++c) {
      sum += std::fabs(static_cast<double>(query(head, c)) * Key(token, kv_head, c));
    }
    return sum;
  }

 private:
  int64_t KeyIndex(int64_t token, int head, int channel) const {
    return table_[token / kBlockTokens] * kv_.layout.block_elements() +
           head * kv_.layout.head_run_elements() + token % kBlockTokens * shape_.head_dim + channel;
  }

  void WriteKey(int64_t token, int head, int channel, float value) {
    const int64_t at = KeyIndex(token, head, channel);
    switch (shape_.dtype) {
      case DType::kBF16:
        reinterpret_cast<uint16_t*>(cache_.data())[at] = Bf16FromFloat(value);
        break;
      case DType::kF16:
        reinterpret_cast<uint16_t*>(cache_.data())[at] = F32ToF16(value);
        break;
      default:
        reinterpret_cast<float*>(cache_.data())[at] = value;
    }
  }

  // Those of the full blocks, as one step that appends the whole sequence makes them.
  void MakeSidecars(std::mt19937& rng) {
    channels_ = std::make_shared<ChannelTable>();
    channels_->num_layers = 1;
    channels_->num_kv_heads = shape_.num_kv_heads;
    channels_->num_channels = kNumLabels;
    std::vector<int16_t> order(static_cast<size_t>(shape_.head_dim));
    std::iota(order.begin(), order.end(), int16_t{0});
    for (int head = 0; head < shape_.num_kv_heads; ++head) {
      std::shuffle(order.begin(), order.end(), rng);
      channels_->channels.insert(channels_->channels.end(), order.begin(),
                                 order.begin() + kNumLabels);
    }
    config_.ranges = true;
    config_.label_bits = 4;
    config_.label_channels = channels_;
    sidecars_.config = &config_;
    sidecars_.num_kv_heads = shape_.num_kv_heads;
    sidecars_.num_blocks = kv_.num_blocks;
    for (int i = 0; i < kNumSidecarKinds; ++i) {
      const int64_t bytes = SidecarBytes(static_cast<SidecarKind>(i), config_, kv_.layout);
      memory_[i].resize(static_cast<size_t>(bytes * shape_.num_kv_heads * kv_.num_blocks) + 64);
      sidecars_.head_bytes[i] = bytes;
      const auto address = reinterpret_cast<uintptr_t>(memory_[i].data());
      sidecars_.data[i] = memory_[i].data() + (64 - address % 64) % 64;
    }

    std::vector<int32_t> positions(static_cast<size_t>(shape_.length));
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<int64_t> slots;
    for (const int32_t position : positions) {
      slots.push_back(int64_t{table_[position / kBlockTokens]} * kBlockTokens +
                      position % kBlockTokens);
    }
    const int32_t cu_seqlens[] = {0, shape_.length};
    UpdateSidecarsParams params;
    params.batch.num_seqs = 1;
    params.batch.num_tokens = shape_.length;
    params.batch.max_blocks_per_seq = static_cast<int>(table_.size());
    params.batch.positions = positions.data();
    params.batch.slot_mapping = slots.data();
    params.batch.cu_seqlens = cu_seqlens;
    params.batch.context_lens = &shape_.length;
    params.batch.block_tables = table_.data();
    params.kv = kv_;
    params.sidecars = sidecars_;
    ThreadPool pool(1);
    UpdateSidecars(params, pool);
  }

  Shape shape_;
  int64_t num_blocks_;
  KvLayerView kv_;
  std::vector<std::byte> cache_;
  std::vector<int32_t> table_;
  std::vector<float> queries_;
  std::shared_ptr<ChannelTable> channels_;
  SidecarConfig config_;
  SidecarLayerView sidecars_;
  std::array<std::vector<std::byte>, kNumSidecarKinds> memory_;
};

// A configuration as the policy reader makes it: `given` keys, defaults for the others.
SelectorConfig ConfigOf(const std::string& name, const std::map<std::string, double>& given,
                        const Context* context = nullptr, std::vector<int> layers = {}) {
  SelectorConfig config;
  config.selector = FindSelector(name);
  REQUIRE(config.selector != nullptr);
  size_t num_used = 0;
  for (const NumberKey& key : config.selector->number_keys()) {
    const auto found = given.find(std::string(key.name));
    num_used += found != given.end();
    config.numbers.push_back(found != given.end()           ? found->second
                             : key.use == KeyUse::kOptional ? key.default_value
                                                            : kNotGiven);
  }
  REQUIRE(num_used == given.size());
  config.layers = std::move(layers);
  if (config.selector->channel_file_keys() != nullptr) config.channels = context->channels();
  return config;
}

// Masks of the heads of one KV head's group.
struct Selection {
  std::vector<TokenMask> masks;
  bool remember = false;
};

Selection SelectFrom(const Context& context, const SelectorConfig& config, int kv_head,
                     std::vector<TokenMask> candidates, int layer = 0,
                     std::span<const TokenMask> remembered = {}) {
  const Shape& shape = context.shape();
  std::vector<float> scratch(
      static_cast<size_t>(shape.num_heads * context.num_blocks() * kBlockTokens), -1e30f);
  SelectParams params;
  params.config = &config;
  params.keys = context.Keys(kv_head);
  params.queries = context.queries();
  params.num_heads = shape.num_heads;
  params.head_dim = shape.head_dim;
  params.context_len = shape.length;
  params.layer = layer;
  params.masks = candidates.data();
  params.remembered = remembered;
  params.scratch = scratch.data();
  config.selector->Select(params);
  return {std::move(candidates), params.remember};
}

std::vector<TokenMask> AllCandidates(const Context& context) {
  return std::vector<TokenMask>(
      static_cast<size_t>(context.shape().num_heads * context.num_blocks()), kAllTokens);
}

std::vector<TokenMask> RandomCandidates(const Context& context, std::mt19937& rng) {
  std::vector<TokenMask> masks = AllCandidates(context);
  for (TokenMask& mask : masks) {
    const auto bits = static_cast<TokenMask>(rng());
    mask = rng() % 3 == 0 ? kNoTokens : rng() % 2 == 0 ? kAllTokens : bits;
  }
  return masks;
}

bool Has(const Context& context, const std::vector<TokenMask>& masks, int head, int64_t token) {
  return (masks[head * context.num_blocks() + token / kBlockTokens] >> token % kBlockTokens & 1) !=
         0;
}

int64_t CountOfHead(const Context& context, const std::vector<TokenMask>& masks, int head) {
  return CountTokens(masks.data() + head * context.num_blocks(), context.num_blocks());
}

// Selected are `count` of the candidates (all, if there are fewer), and none that was left out has
// a score above one that was taken. Scores may be off by `tolerance` each.
void CheckTopTokens(const Context& context, const std::vector<TokenMask>& candidates,
                    const std::vector<TokenMask>& selected, int64_t count,
                    const std::function<double(int head, int64_t token)>& score, double tolerance) {
  for (int head = 0; head < context.shape().num_heads; ++head) {
    CAPTURE(head);
    const int64_t available = CountOfHead(context, candidates, head);
    REQUIRE(CountOfHead(context, selected, head) == std::clamp<int64_t>(count, 0, available));
    double worst_taken = std::numeric_limits<double>::infinity();
    double best_left = -worst_taken;
    for (int64_t token = 0; token < context.num_blocks() * kBlockTokens; ++token) {
      if (!Has(context, candidates, head, token)) continue;
      const double value = score(head, token);
      if (Has(context, selected, head, token)) {
        worst_taken = std::min(worst_taken, value);
      } else {
        best_left = std::max(best_left, value);
      }
    }
    REQUIRE(best_left <= worst_taken + tolerance);
  }
}

double RoundingOf(const Context& context, int kv_head) {
  double magnitude = 0;
  for (int64_t token = 0; token < context.num_blocks() * kBlockTokens; ++token) {
    for (int head = 0; head < context.shape().num_heads; ++head) {
      magnitude = std::max(magnitude, context.Magnitude(token, kv_head, head));
    }
  }
  return 2 * context.shape().head_dim * 0x1p-24 * magnitude;
}

struct Case {
  std::string name;
  std::map<std::string, double> keys;
  std::vector<int> layers;
};

// Every selector with a budget, which is replaced by `budget_key`.
std::vector<Case> CasesWithBudget(const std::string& budget_key, double budget) {
  return {
      {"quest", {{budget_key, budget}}, {}},
      {"ds", {{budget_key, budget}, {"r", kNumLabels}}, {}},
      {"sparq", {{budget_key, budget}, {"r", 6}}, {}},
      {"tidal_decode", {{budget_key, budget}}, {0, 3}},
      {"oracle_topk", {{budget_key, budget}}, {}},
  };
}

TEST_CASE("The registry has the selectors of the documentation", "[selector]") {
  std::vector<std::string_view> names;
  for (const Selector* selector : Selectors()) {
    names.push_back(selector->name());
    CHECK(FindSelector(selector->name()) == selector);
  }
  CHECK(names == std::vector<std::string_view>{"none", "quest", "ds", "streaming", "sparq",
                                               "tidal_decode", "oracle_topk"});
  CHECK(FindSelector("Quest") == nullptr);
  CHECK(FindSelector("") == nullptr);
}

TEST_CASE("Declared keys are consistent", "[selector]") {
  for (const Selector* selector : Selectors()) {
    CAPTURE(std::string(selector->name()));
    std::set<std::string_view> names;
    int num_one_of = 0;
    for (const NumberKey& key : selector->number_keys()) {
      CAPTURE(std::string(key.name));
      CHECK(names.insert(key.name).second);
      CHECK(key.min <= key.max);
      if (key.use == KeyUse::kOptional) {
        CHECK(key.default_value >= key.min);
        CHECK(key.default_value <= key.max);
      }
      num_one_of += key.use == KeyUse::kOneOf;
      for (const double value : key.allowed) CHECK((value >= key.min && value <= key.max));
    }
    CHECK(num_one_of != 1);
    if (const ChannelFileKeys* keys = selector->channel_file_keys()) {
      CHECK(names.count(keys->count) == 1);
    }
  }
}

TEST_CASE("Sidecars that policies read", "[selector]") {
  SparsityPolicy policy;
  policy.selector = ConfigOf("none", {});
  CHECK(SidecarsOf(policy).empty());
  policy.selector = ConfigOf("quest", {{"token_budget", 64}});
  CHECK(SidecarsOf(policy).ranges);
  policy.estimator = {EstimatorType::kMinMaxQuant, 4};
  policy.tail = TailType::kBlockMean;
  SidecarConfig sidecars = SidecarsOf(policy);
  CHECK(sidecars.ranges);
  CHECK(sidecars.min_max_quant_bits == 4);
  CHECK(sidecars.mean_values);
  CHECK(sidecars.max_quant_bits == 0);
  CHECK(sidecars.block_quant_bits == 0);
  CHECK(sidecars.label_bits == 0);

  policy = {};
  policy.selector = ConfigOf("oracle_topk", {{"token_budget", 64}});
  policy.estimator = {EstimatorType::kBlockQuant, 2};
  CHECK(SidecarsOf(policy).ranges);
  CHECK(SidecarsOf(policy).block_quant_bits == 2);
  policy.estimator = {EstimatorType::kMaxQuant, 8};
  CHECK_FALSE(SidecarsOf(policy).ranges);
  CHECK(SidecarsOf(policy).max_quant_bits == 8);

  std::mt19937 rng(kSeed);
  const Context context({}, rng);
  policy = {};
  policy.selector =
      ConfigOf("ds", {{"token_budget", 64}, {"r", kNumLabels}, {"quant_bit", 2}}, &context);
  sidecars = SidecarsOf(policy);
  CHECK(sidecars.label_bits == 2);
  CHECK(sidecars.label_channels == context.channels());
  CHECK_FALSE(sidecars.ranges);
}

TEST_CASE("Every selector: a subset of the candidates, within the budget, the same again",
          "[selector]") {
  std::mt19937 rng(kSeed + 1);
  for (const int length : {1, 16, 17, 32, 33, 100, 257}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      const Context context({.dtype = dtype, .length = length}, rng);
      for (const double budget : {1, 16, 17, 40, 100}) {
        std::vector<Case> cases = CasesWithBudget("token_budget", budget);
        cases.push_back({"streaming", {{"num_sinks", 3}, {"token_budget", budget}}, {}});
        cases.push_back({"none", {}, {}});
        for (const Case& c : cases) {
          CAPTURE(c.name, length, budget);
          const SelectorConfig config = ConfigOf(c.name, c.keys, &context, c.layers);
          const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
          const Selection first = SelectFrom(context, config, 1, candidates);
          for (size_t i = 0; i < candidates.size(); ++i) {
            REQUIRE((first.masks[i] & ~uint32_t{candidates[i]}) == 0);
          }
          REQUIRE(SelectFrom(context, config, 1, candidates).masks == first.masks);
          if (c.name == "none") {
            REQUIRE(first.masks == candidates);
            continue;
          }
          // Quest's budget is in whole blocks, and the open one is one of them.
          const double blocks = std::ceil(budget / kBlockTokens) - 1;
          const double most = c.name == "quest"       ? blocks * kBlockTokens
                              : c.name == "streaming" ? budget - context.num_open() + 3
                                                      : budget - context.num_open();
          for (int head = 0; head < context.shape().num_heads; ++head) {
            REQUIRE(static_cast<double>(CountOfHead(context, first.masks, head)) <=
                    std::max(most, c.name == "streaming" ? 3.0 : 0.0));
          }
        }
      }
    }
  }
}

TEST_CASE("A budget of the whole context selects every candidate", "[selector]") {
  std::mt19937 rng(kSeed + 2);
  for (const int length : {1, 33, 100, 160}) {
    const Context context({.length = length}, rng);
    const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
    std::vector<Case> cases = CasesWithBudget("token_budget", length);
    for (const Case& c : CasesWithBudget("token_budget", 1 << 24)) cases.push_back(c);
    for (const Case& c : CasesWithBudget("sparsity_rate", 1)) cases.push_back(c);
    cases.push_back({"streaming", {{"token_budget", length}}, {}});
    for (const Case& c : cases) {
      CAPTURE(c.name, length);
      const SelectorConfig config = ConfigOf(c.name, c.keys, &context, c.layers);
      CHECK(SelectFrom(context, config, 0, candidates).masks == candidates);
    }
  }
}

TEST_CASE("A rate is a share of the context, rounded up", "[selector]") {
  std::mt19937 rng(kSeed + 3);
  const Context context({.length = 100}, rng);  // 4 tokens in the open block
  const auto count_with = [&](double rate) {
    const SelectorConfig config = ConfigOf("oracle_topk", {{"sparsity_rate", rate}});
    return CountOfHead(context, SelectFrom(context, config, 0, AllCandidates(context)).masks, 0);
  };
  CHECK(count_with(0.07) == 3);
  CHECK(count_with(0.071) == 4);
  CHECK(count_with(0.5) == 46);
  CHECK(count_with(0.001) == 0);
}

TEST_CASE("oracle_topk selects the largest logits", "[selector]") {
  std::mt19937 rng(kSeed + 4);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int length : {18, 100, 300}) {
      const Context context({.dtype = dtype, .length = length}, rng);
      for (const int budget : {5, 20, 60}) {
        const SelectorConfig config = ConfigOf("oracle_topk", {{"token_budget", budget}});
        for (int kv_head = 0; kv_head < 2; ++kv_head) {
          CAPTURE(length, budget, kv_head);
          const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
          const Selection selection = SelectFrom(context, config, kv_head, candidates);
          CHECK_FALSE(selection.remember);
          CheckTopTokens(
              context, candidates, selection.masks, budget - context.num_open(),
              [&](int head, int64_t token) { return context.Logit(token, kv_head, head); },
              RoundingOf(context, kv_head));
        }
      }
    }
  }
}

TEST_CASE("sparq selects by the query's largest channels", "[selector]") {
  std::mt19937 rng(kSeed + 5);
  const Context context({.length = 200}, rng);
  for (const int r : {1, 4, 31, 32, 100}) {
    CAPTURE(r);
    const SelectorConfig config = ConfigOf("sparq", {{"token_budget", 50}, {"r", r}});
    std::vector<std::vector<bool>> included;
    for (int head = 0; head < context.shape().num_heads; ++head) {
      std::vector<int> order(static_cast<size_t>(context.shape().head_dim));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return std::fabs(context.query(head, a)) > std::fabs(context.query(head, b));
      });
      std::vector<bool> include(order.size());
      for (int i = 0; i < std::min(r, context.shape().head_dim); ++i) include[order[i]] = true;
      included.push_back(std::move(include));
    }
    const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
    CheckTopTokens(
        context, candidates, SelectFrom(context, config, 1, candidates).masks,
        50 - context.num_open(),
        [&](int head, int64_t token) { return context.Logit(token, 1, head, included[head]); },
        RoundingOf(context, 1));
  }
}

TEST_CASE("ds selects by the calibrated channels", "[selector]") {
  std::mt19937 rng(kSeed + 6);
  const Context context({.length = 200}, rng);
  const SelectorConfig config = ConfigOf("ds", {{"token_budget", 50}, {"r", kNumLabels}}, &context);
  for (int kv_head = 0; kv_head < 2; ++kv_head) {
    const int16_t* channels = context.channels()->Head(0, kv_head);
    std::vector<bool> include(static_cast<size_t>(context.shape().head_dim));
    for (int i = 0; i < kNumLabels; ++i) include[channels[i]] = true;
    // Labels of 4 bits are off by half a step, a fifteenth of the token's range; normal keys stay
    // within 5 of zero. sidecars.h and estimate.h have the bounds.
    double tolerance = 0;
    for (int head = 0; head < context.shape().num_heads; ++head) {
      double weight = 0;
      for (int i = 0; i < kNumLabels; ++i) weight += std::fabs(context.query(head, channels[i]));
      tolerance = std::max(tolerance, 2 * weight * 10.0 / 15 / 2 * 1.1);
    }
    const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
    const Selection selection = SelectFrom(context, config, kv_head, candidates);
    CheckTopTokens(
        context, candidates, selection.masks, 50 - context.num_open(),
        [&](int head, int64_t token) { return context.Logit(token, kv_head, head, include); },
        tolerance);

    // Beyond that bound: exactly the order of the labels' own logits.
    std::vector<float> logits(
        static_cast<size_t>(context.shape().num_heads * context.num_blocks() * kBlockTokens));
    EstimateFromLabelsParams labels;
    labels.keys = context.Keys(kv_head);
    labels.queries = context.queries();
    labels.num_heads = context.shape().num_heads;
    labels.head_dim = context.shape().head_dim;
    labels.masks = candidates.data();
    labels.logits = logits.data();
    EstimateFromLabels(labels);
    CheckTopTokens(
        context, candidates, selection.masks, 50 - context.num_open(),
        [&](int head, int64_t token) {
          return logits[head * context.num_blocks() * kBlockTokens + token];
        },
        0);
  }
}

TEST_CASE("streaming keeps the first tokens and the last ones", "[selector]") {
  std::mt19937 rng(kSeed + 7);
  const Context context({.length = 100}, rng);
  for (const int num_sinks : {0, 4, 16, 21, 96, 1000}) {
    for (const int budget : {1, 4, 5, 40, 95}) {
      CAPTURE(num_sinks, budget);
      const SelectorConfig config =
          ConfigOf("streaming", {{"num_sinks", num_sinks}, {"token_budget", budget}});
      const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
      const Selection selection = SelectFrom(context, config, 0, candidates);
      int num_wrong = 0;
      for (int head = 0; head < context.shape().num_heads; ++head) {
        for (int64_t token = 0; token < 96; ++token) {
          const bool expected =
              Has(context, candidates, head, token) && (token < num_sinks || token >= 100 - budget);
          num_wrong += Has(context, selection.masks, head, token) != expected;
        }
      }
      CHECK(num_wrong == 0);
    }
  }
}

TEST_CASE("tidal_decode reuses what the listed layers have selected", "[selector]") {
  std::mt19937 rng(kSeed + 8);
  const Shape shape = {.length = 200};
  // A layer's keys and queries are its own.
  std::vector<std::unique_ptr<Context>> layers;
  for (int i = 0; i < 8; ++i) layers.push_back(std::make_unique<Context>(shape, rng));
  const SelectorConfig config = ConfigOf("tidal_decode", {{"token_budget", 50}}, nullptr, {3, 6});
  const SelectorConfig exact = ConfigOf("oracle_topk", {{"token_budget", 50}});
  const auto exact_of = [&](int layer) {
    return SelectFrom(*layers[layer], exact, 0, AllCandidates(*layers[layer])).masks;
  };
  std::vector<TokenMask> remembered;
  const auto run_layer = [&](int layer, std::vector<TokenMask> candidates) {
    Selection selection =
        SelectFrom(*layers[layer], config, 0, std::move(candidates), layer, remembered);
    if (selection.remember) remembered = selection.masks;
    return selection;
  };
  const auto run = [&](int layer) { return run_layer(layer, AllCandidates(*layers[layer])); };

  for (const int layer : {0, 2}) {  // before the list: each for itself
    const Selection selection = run(layer);
    CHECK(selection.masks == exact_of(layer));
    CHECK_FALSE(selection.remember);
  }
  for (const int layer : {3, 4, 5}) {
    const Selection selection = run(layer);
    CHECK(selection.masks == exact_of(3));
    CHECK(selection.remember == (layer == 3));
  }
  for (const int layer : {6, 7}) CHECK(run(layer).masks == exact_of(6));

  // Reused sets are narrowed to the layer's own candidates.
  const std::vector<TokenMask> some = RandomCandidates(*layers[7], rng);
  const Selection narrowed = run_layer(7, some);
  for (size_t i = 0; i < some.size(); ++i) {
    REQUIRE(narrowed.masks[i] == (some[i] & remembered[i]));
  }

  // The listed layer was dense: the first sparse one after it selects for those that follow.
  remembered.clear();
  const Selection first = run(4);
  CHECK(first.remember);
  CHECK(first.masks == exact_of(4));
  CHECK(run(5).masks == exact_of(4));
}

// ---- quest

// Minimum and maximum of a channel of a block's keys.
std::pair<double, double> RangeOf(const Context& context, int64_t block, int kv_head, int channel) {
  double min = std::numeric_limits<double>::infinity();
  double max = -min;
  for (int i = 0; i < kBlockTokens; ++i) {
    const double key = context.Key(block * kBlockTokens + i, kv_head, channel);
    min = std::min(min, key);
    max = std::max(max, key);
  }
  return {min, max};
}

double BoundOf(const Context& context, int64_t block, int kv_head, int head) {
  double bound = 0;
  for (int c = 0; c < context.shape().head_dim; ++c) {
    const auto [min, max] = RangeOf(context, block, kv_head, c);
    const double q = context.query(head, c);
    bound += std::max(q * min, q * max);
  }
  return bound;
}

const std::vector<std::pair<const char*, KeyOf>>& KindsOfKeys() {
  static const std::vector<std::pair<const char*, KeyOf>> kinds = {
      {"normal", [](int64_t, int, std::mt19937& rng) { return Normal(rng); }},
      {"constant", [](int64_t, int channel, std::mt19937&) { return 0.25f * channel - 3; }},
      {"zero", [](int64_t, int, std::mt19937&) { return 0.0f; }},
      {"negative", [](int64_t, int, std::mt19937& rng) { return -std::fabs(Normal(rng)) - 0.5f; }},
      {"outlier channel",
       [](int64_t, int channel, std::mt19937& rng) {
         return channel == 7 ? 200 + Normal(rng) : Normal(rng);
       }},
      {"outlier token",
       [](int64_t token, int, std::mt19937& rng) {
         return token % 37 == 5 ? -60000.0f : Normal(rng);
       }},
      {"subnormal", [](int64_t, int, std::mt19937& rng) { return 1e-40f * Normal(rng); }},
      {"cancelling", [](int64_t token, int channel,
                        std::mt19937&) { return (token + channel) % 2 == 0 ? 1000.0f : -1000.0f; }},
  };
  return kinds;
}

void CheckBounds(const Context& context) {
  const Shape& shape = context.shape();
  const int64_t stride = context.num_blocks() * kBlockTokens;
  const std::vector<TokenMask> masks = AllCandidates(context);
  for (int kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    std::vector<float> scores(static_cast<size_t>(shape.num_heads * stride));
    ScoreBlocks({.keys = context.Keys(kv_head),
                 .queries = context.queries(),
                 .num_heads = shape.num_heads,
                 .head_dim = shape.head_dim,
                 .masks = masks.data(),
                 .scores = scores.data()});
    for (int head = 0; head < shape.num_heads; ++head) {
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        CAPTURE(kv_head, head, block);
        double magnitude = 0;  // of the corner that the bound is at
        for (int c = 0; c < shape.head_dim; ++c) {
          double largest = 0;
          for (int i = 0; i < kBlockTokens; ++i) {
            const double key = context.Key(block * kBlockTokens + i, kv_head, c);
            largest = std::max(largest, std::fabs(key));
          }
          magnitude += std::fabs(static_cast<double>(context.query(head, c))) * largest;
        }
        const double rounding = shape.head_dim * 0x1p-24 * magnitude + 1e-44;
        const double score = scores[head * stride + block];
        REQUIRE(std::fabs(score - BoundOf(context, block, kv_head, head)) <= rounding);
        for (int i = 0; i < kBlockTokens; ++i) {
          REQUIRE(context.Logit(block * kBlockTokens + i, kv_head, head) <= score + rounding);
        }
      }
    }
  }
}

TEST_CASE("Block scores bound every logit of the block", "[selector]") {
  std::mt19937 rng(kSeed + 9);
  for (const auto& [name, key_of] : KindsOfKeys()) {
    CAPTURE(name);
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (const int num_heads : {1, 2, 3, 4, 7}) {
        for (const int head_dim : {16, 64, 80, 128}) {
          const Shape shape = {.dtype = dtype,
                               .num_kv_heads = 2,
                               .num_heads = num_heads,
                               .head_dim = head_dim,
                               .length = 120};
          CheckBounds(Context(shape, rng, key_of));
        }
      }
    }
  }
}

TEST_CASE("Block scores on every instruction set", "[selector]") {
  ForEachSimdTarget([&] {
    std::mt19937 rng(kSeed + 10);
    const Context context({.num_heads = 5, .head_dim = 48, .length = 200}, rng);
    CheckBounds(context);
  });
}

TEST_CASE("quest selects whole blocks, those with the largest bounds", "[selector]") {
  std::mt19937 rng(kSeed + 11);
  const Context context({.length = 260}, rng);  // 16 full blocks and the open one
  for (const int budget : {1, 16, 17, 100, 256, 257, 300}) {
    const SelectorConfig config = ConfigOf("quest", {{"token_budget", budget}});
    const std::vector<TokenMask> candidates = RandomCandidates(context, rng);
    const Selection selection = SelectFrom(context, config, 1, candidates);
    for (int head = 0; head < context.shape().num_heads; ++head) {
      CAPTURE(budget, head);
      int num_candidates = 0;
      int num_selected = 0;
      double worst_taken = std::numeric_limits<double>::infinity();
      double best_left = -worst_taken;
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        const int64_t i = head * context.num_blocks() + block;
        if (candidates[i] == kNoTokens) continue;
        ++num_candidates;
        const double bound = BoundOf(context, block, 1, head);
        if (selection.masks[i] == kNoTokens) {
          best_left = std::max(best_left, bound);
        } else {
          REQUIRE(selection.masks[i] == candidates[i]);
          ++num_selected;
          worst_taken = std::min(worst_taken, bound);
        }
      }
      CHECK(num_selected == std::min(num_candidates, (budget + 15) / 16 - 1));
      CHECK(best_left <= worst_taken + RoundingOf(context, 1));
    }
  }
}

// The middle of the range and `weight` of its half, which is Quest's bound at 1.
double ScoreOf(const Context& context, int64_t block, int kv_head, int head, double weight) {
  double score = 0;
  for (int c = 0; c < context.shape().head_dim; ++c) {
    const auto [min, max] = RangeOf(context, block, kv_head, c);
    const double q = context.query(head, c);
    score += q * (min + max) / 2 + weight * std::fabs(q) * (max - min) / 2;
  }
  return score;
}

TEST_CASE("Block scores count a part of the range", "[selector]") {
  std::mt19937 rng(kSeed + 12);
  const Context context({.length = 200}, rng);
  const std::vector<TokenMask> masks = AllCandidates(context);
  const int64_t stride = context.num_blocks() * kBlockTokens;
  for (const float weight : {0.0f, 0.25f, 0.5f, 1.0f}) {
    std::vector<float> scores(static_cast<size_t>(context.shape().num_heads * stride));
    ScoreBlocks({.keys = context.Keys(1),
                 .queries = context.queries(),
                 .num_heads = context.shape().num_heads,
                 .head_dim = context.shape().head_dim,
                 .range_weight = weight,
                 .masks = masks.data(),
                 .scores = scores.data()});
    for (int head = 0; head < context.shape().num_heads; ++head) {
      for (int64_t block = 0; block < context.num_blocks(); ++block) {
        CAPTURE(weight, head, block);
        const double exact = ScoreOf(context, block, 1, head, double{weight});
        CHECK(std::fabs(scores[head * stride + block] - exact) <= RoundingOf(context, 1));
      }
    }
  }
}

}  // namespace
}  // namespace gloam::cpu
