// Every selector on random caches: what all of them promise, and what each of them selects, against
// oracles in double precision. quest's bounds: quest_test.cc.
#include "kernels/selector.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/estimate.h"
#include "tests/kernels/selector_context.h"

namespace gloam::cpu {
namespace {

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

}  // namespace
}  // namespace gloam::cpu
