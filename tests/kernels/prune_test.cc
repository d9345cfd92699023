// Top-p and thresholds against an oracle that sorts, on random and on hostile rows, for every
// instruction set.
#include "kernels/prune.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "catch2/catch.hpp"
#include "tests/kernels/simd_targets.h"

namespace gloam::cpu {
namespace {

constexpr uint32_t kSeed = 20261123;
// What prune.h allows for sums in double.
constexpr double kAllowance = 1e-10;
constexpr float kUnread = std::numeric_limits<float>::quiet_NaN();

// One row with its outputs. Logits of tokens that are no candidates are NaN: they must not be read
// into anything.
struct Row {
  PrunerConfig pruner;
  std::vector<float> logits;
  std::vector<TokenMask> candidates;
  std::vector<TokenMask> always;
  std::vector<float> open;

  std::vector<float> weights;
  std::vector<TokenMask> kept;

  int64_t num_blocks() const { return static_cast<int64_t>(candidates.size()); }
  int64_t num_tokens() const { return num_blocks() * kBlockTokens; }

  static bool Has(const std::vector<TokenMask>& masks, int64_t token) {
    return (masks[token / kBlockTokens] >> token % kBlockTokens & 1) != 0;
  }
  bool IsAlways(int64_t token) const { return !always.empty() && Has(always, token); }

  PruneResult Run() {
    for (int64_t i = 0; i < num_tokens(); ++i) {
      if (!Has(candidates, i)) logits[i] = kUnread;
    }
    weights.assign(logits.size(), -7.0f);
    kept.assign(candidates.size(), 0x5a5a);
    PruneParams params;
    params.pruner = pruner;
    params.logits = logits.data();
    params.candidates = candidates.data();
    params.always_kept = always.empty() ? nullptr : always.data();
    params.num_blocks = num_blocks();
    params.open_logits = open.data();
    params.num_open = static_cast<int>(open.size());
    params.weights = weights.data();
    params.kept = kept.data();
    return Prune(params);
  }
};

double MassOf(const Row& row, const std::vector<TokenMask>& masks) {
  long double mass = 0;
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    if (Row::Has(masks, i)) mass += row.weights[i];
  }
  return static_cast<double>(mass);
}

double OpenMass(const Row& row, float max) {
  double mass = 0;
  for (const float logit : row.open) mass += std::exp(static_cast<double>(logit) - max);
  return mass;
}

// What holds whatever the pruner: weights, sums and subsets are what the header says.
void CheckOutputs(const Row& row, const PruneResult& result) {
  float max = -FLT_MAX;
  for (const float logit : row.open) max = std::max(max, logit);
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    if (Row::Has(row.candidates, i)) max = std::max(max, row.logits[i]);
  }
  REQUIRE(result.max_logit == max);

  int num_wrong_weights = 0;
  int num_outside = 0;
  int64_t num_kept = 0;
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    const bool is_candidate = Row::Has(row.candidates, i);
    const float weight = row.weights[i];
    if (is_candidate) {
      const double exact = std::exp(static_cast<double>(row.logits[i]) - max);
      // The difference of the logits is rounded to fp32 before it is exponentiated.
      const double tolerance =
          exact * (2e-6 + 1.2e-7 * std::fabs(static_cast<double>(row.logits[i]) - max)) + 1e-37;
      num_wrong_weights += !(std::fabs(weight - exact) <= tolerance);
    } else {
      num_wrong_weights += weight != 0;
    }
    const bool is_kept = Row::Has(row.kept, i);
    num_outside += (is_kept && !is_candidate) || (row.IsAlways(i) && !is_kept);
    num_kept += is_kept;
  }
  REQUIRE(num_wrong_weights == 0);
  REQUIRE(num_outside == 0);
  REQUIRE(result.num_kept == num_kept);
  REQUIRE(num_kept >= std::min<int64_t>(row.pruner.min_tokens,
                                        CountTokens(row.candidates.data(), row.num_blocks())));

  const double open_mass = OpenMass(row, max);
  const double total = MassOf(row, row.candidates) + open_mass;
  REQUIRE(std::fabs(result.total_mass - total) <= kAllowance * total);
  const double kept = MassOf(row, row.kept) + open_mass;
  REQUIRE(std::fabs(result.kept_mass - kept) <= kAllowance * total);
}

// Candidates that are not always kept, the largest weights first, the lowest index among equals.
std::vector<int64_t> SortedChoices(const Row& row) {
  std::vector<int64_t> choices;
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    if (Row::Has(row.candidates, i) && !row.IsAlways(i)) choices.push_back(i);
  }
  std::stable_sort(choices.begin(), choices.end(),
                   [&](int64_t a, int64_t b) { return row.weights[a] > row.weights[b]; });
  return choices;
}

// The weight from which keep_weight keeps.
float HeavyWeight(const Row& row, const PruneResult& result) {
  if (row.pruner.keep_weight == 0) return std::numeric_limits<float>::infinity();
  return static_cast<float>(row.pruner.keep_weight * result.total_mass);
}

// The set that the header describes for top-p, from the weights that Run has left, or nothing where
// rounding may decide between two.
std::optional<std::vector<TokenMask>> ExpectedTopP(const Row& row, const PruneResult& result) {
  if (row.pruner.threshold >= 1) return row.candidates;
  std::vector<TokenMask> kept(row.candidates.size(), kNoTokens);
  if (!row.always.empty()) kept = row.always;
  long double mass = MassOf(row, kept) + OpenMass(row, result.max_logit);
  const long double wanted = row.pruner.threshold * static_cast<long double>(result.total_mass);
  const long double doubt = kAllowance * result.total_mass;
  const auto take = [&](int64_t token) {
    kept[token / kBlockTokens] |= static_cast<TokenMask>(1 << token % kBlockTokens);
  };
  const std::vector<int64_t> choices = SortedChoices(row);
  const float heavy = HeavyWeight(row, result);
  size_t next = 0;
  while (next < choices.size()) {
    const float weight = row.weights[choices[next]];
    if (weight < heavy) {
      if (std::fabs(static_cast<double>(mass - wanted)) <= doubt) return std::nullopt;
      if (mass >= wanted) break;
    }
    for (; next < choices.size() && row.weights[choices[next]] == weight; ++next) {
      mass += weight;
      take(choices[next]);
    }
  }
  int64_t missing = row.pruner.min_tokens - CountTokens(kept.data(), row.num_blocks());
  for (; next < choices.size() && missing > 0; ++next, --missing) take(choices[next]);
  return kept;
}

// The invariant itself, without an oracle: enough is kept, and one weight less is not enough.
void CheckMinimal(const Row& row, const PruneResult& result) {
  const double wanted = row.pruner.threshold * result.total_mass;
  const double doubt = kAllowance * result.total_mass;
  REQUIRE(result.kept_mass >= wanted - doubt);
  if (row.pruner.threshold >= 1 || row.pruner.min_tokens > 0) return;
  float smallest = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    if (Row::Has(row.kept, i) && !row.IsAlways(i)) smallest = std::min(smallest, row.weights[i]);
  }
  if (smallest >= HeavyWeight(row, result)) return;  // without any: infinite
  double dropped = 0;
  for (int64_t i = 0; i < row.num_tokens(); ++i) {
    if (Row::Has(row.kept, i) && !row.IsAlways(i) && row.weights[i] == smallest) {
      dropped += smallest;
    }
  }
  REQUIRE(result.kept_mass - dropped < wanted + doubt);
}

// Returns whether rounding left the oracle a say.
bool CheckTopP(Row& row) {
  const PruneResult result = row.Run();
  CheckOutputs(row, result);
  CheckMinimal(row, result);
  const auto expected = ExpectedTopP(row, result);
  if (expected.has_value()) REQUIRE(row.kept == *expected);
  return expected.has_value();
}

// ---- rows

std::vector<TokenMask> RandomMasks(int64_t num_blocks, double share, std::mt19937& rng) {
  std::bernoulli_distribution is_set(share);
  std::vector<TokenMask> masks(num_blocks);
  for (TokenMask& mask : masks) {
    for (int i = 0; i < kBlockTokens; ++i) mask |= static_cast<TokenMask>(is_set(rng) << i);
  }
  return masks;
}

using LogitsOf = std::function<float(int64_t token, std::mt19937& rng)>;

float Normal(std::mt19937& rng) { return std::normal_distribution<float>()(rng); }

// Rows that real heads show, and rows that break naive searches.
const std::vector<std::pair<const char*, LogitsOf>>& Kinds() {
  static const std::vector<std::pair<const char*, LogitsOf>> kinds = {
      {"flat", [](int64_t, std::mt19937& rng) { return 0.1f * Normal(rng); }},
      {"normal", [](int64_t, std::mt19937& rng) { return 3 * Normal(rng); }},
      {"sharp", [](int64_t, std::mt19937& rng) { return 12 * Normal(rng); }},
      {"strong sink",
       [](int64_t token, std::mt19937& rng) { return Normal(rng) + (token == 0 ? 9.0f : 0.0f); }},
      {"weak sink",
       [](int64_t token, std::mt19937& rng) { return Normal(rng) - (token == 0 ? 30.0f : 0.0f); }},
      {"ties", [](int64_t, std::mt19937& rng) { return std::round(2 * Normal(rng)); }},
      {"two values",
       [](int64_t, std::mt19937& rng) {
         return rng() % 2 == 0 ? 1.0f : std::nextafter(1.0f, 2.0f);
       }},
      {"one spike",
       [](int64_t token, std::mt19937& rng) { return token == 5 ? 80.0f : 1e-3f * Normal(rng); }},
      {"all equal", [](int64_t, std::mt19937&) { return -3.5f; }},
      {"geometric",
       [](int64_t token, std::mt19937&) { return -0.6931472f * static_cast<float>(token); }},
      {"tiny", [](int64_t, std::mt19937& rng) { return 1e-30f * Normal(rng); }},
      {"huge", [](int64_t, std::mt19937& rng) { return 1e30f * Normal(rng); }},
      {"far below zero", [](int64_t, std::mt19937& rng) { return -1e4f + Normal(rng); }},
      {"heavy tail",
       [](int64_t, std::mt19937& rng) { return std::cauchy_distribution<float>(0, 2)(rng); }},
  };
  return kinds;
}

float RandomShare(std::mt19937& rng) {
  constexpr float kShares[] = {1e-6f, 0.01f, 0.3f,   0.5f,      0.7f, 0.85f,
                               0.95f, 0.99f, 0.999f, 0.999999f, 1.0f};
  if (rng() % 3 == 0) return std::uniform_real_distribution<float>(1e-6f, 1.0f)(rng);
  return kShares[rng() % std::size(kShares)];
}

Row RandomRow(const LogitsOf& logit_of, std::mt19937& rng) {
  Row row;
  constexpr int kSizes[] = {1, 2, 3, 7, 32, 96};
  const int64_t num_blocks = kSizes[rng() % std::size(kSizes)];
  constexpr double kCandidateShares[] = {0.0, 0.02, 0.5, 0.9, 1.0, 1.0};
  row.candidates = RandomMasks(num_blocks, kCandidateShares[rng() % 6], rng);
  if (rng() % 3 == 0) {  // whole blocks out, as after Quest
    for (TokenMask& mask : row.candidates) mask = rng() % 4 == 0 ? mask : kNoTokens;
  }
  for (int64_t i = 0; i < num_blocks * kBlockTokens; ++i) row.logits.push_back(logit_of(i, rng));
  if (rng() % 2 == 0) {
    row.always = RandomMasks(num_blocks, rng() % 2 == 0 ? 0.05 : 0.5, rng);
    for (int64_t i = 0; i < num_blocks; ++i) row.always[i] &= row.candidates[i];
  }
  for (uint32_t i = rng() % 17; i > 0; --i) row.open.push_back(logit_of(1000 + i, rng));
  row.pruner.type = PrunerType::kTopP;
  row.pruner.threshold = RandomShare(rng);
  if (rng() % 4 == 0) row.pruner.min_tokens = static_cast<int>(rng() % 64);
  constexpr float kKeepWeights[] = {0, 0, 1e-4f, 1e-3f, 0.03f, 0.5f, 1};
  row.pruner.keep_weight = kKeepWeights[rng() % std::size(kKeepWeights)];
  return row;
}

TEST_CASE("Top-p keeps the smallest set of largest weights that holds the mass", "[prune]") {
  std::mt19937 rng(kSeed);
  int num_decided = 0;
  int num_rows = 0;
  for (const auto& [name, logit_of] : Kinds()) {
    CAPTURE(name);
    for (int i = 0; i < 750; ++i, ++num_rows) {
      CAPTURE(i);
      Row row = RandomRow(logit_of, rng);
      num_decided += CheckTopP(row);
    }
  }
  CHECK(num_rows >= 10000);
  CHECK(num_decided > num_rows * 9 / 10);
}

TEST_CASE("Every instruction set prunes to the oracle's set", "[prune]") {
  ForEachSimdTarget([] {
    std::mt19937 rng(kSeed + 1);
    for (const auto& [name, logit_of] : Kinds()) {
      CAPTURE(name);
      for (int i = 0; i < 20; ++i) {
        Row row = RandomRow(logit_of, rng);
        CheckTopP(row);
        const std::vector<TokenMask> kept = row.kept;
        const std::vector<float> weights = row.weights;
        row.Run();
        REQUIRE(row.kept == kept);
        REQUIRE(row.weights == weights);
      }
    }
  });
}

TEST_CASE("A long row", "[prune]") {
  std::mt19937 rng(kSeed + 2);
  for (const auto& [name, logit_of] : Kinds()) {
    CAPTURE(name);
    Row row;
    row.candidates.assign(8192, kAllTokens);
    for (int i = 0; i < 8192 * kBlockTokens; ++i) row.logits.push_back(logit_of(i, rng));
    row.pruner.type = PrunerType::kTopP;
    row.pruner.threshold = 0.85f;
    CheckTopP(row);
  }
}

Row SmallRow(std::vector<float> logits, PrunerType type, float threshold) {
  Row row;
  row.pruner.type = type;
  row.pruner.threshold = threshold;
  row.candidates.assign((logits.size() + kBlockTokens - 1) / kBlockTokens, kNoTokens);
  for (size_t i = 0; i < logits.size(); ++i) {
    row.candidates[i / kBlockTokens] |= static_cast<TokenMask>(1 << i % kBlockTokens);
  }
  row.logits = std::move(logits);
  row.logits.resize(row.candidates.size() * kBlockTokens, 0.0f);
  return row;
}

TEST_CASE("The maximum need not be the first token", "[prune]") {
  // The first token far below the maximum: a search from [0, first weight] would keep everything.
  Row row = SmallRow({-20, 0, 5, 0, 0, 0, 0, 0}, PrunerType::kTopP, 0.9f);
  row.Run();
  CHECK(row.kept[0] == 0b100);
}

TEST_CASE("Equal weights are kept or dropped together, and min_tokens splits them", "[prune]") {
  Row row = SmallRow(std::vector<float>(20, 1.0f), PrunerType::kTopP, 0.1f);
  CHECK(row.Run().num_kept == 20);

  Row sharp = SmallRow({0, 0, 20, 0, 0}, PrunerType::kTopP, 0.5f);
  CHECK(sharp.Run().num_kept == 1);
  sharp.pruner.min_tokens = 3;
  CHECK(sharp.Run().num_kept == 3);
  CHECK(sharp.kept[0] == 0b111);  // the lowest indices of the equal ones
  sharp.pruner.min_tokens = 100;
  CHECK(sharp.Run().num_kept == 5);
}

TEST_CASE("Heavy weights stay whatever share top-p wants", "[prune]") {
  // exp(3), exp(2), exp(1) and three times 1 of 33.2: 61, 22, 8 and 3 per cent.
  Row row = SmallRow({0, 3, 0, 2, 1, 0}, PrunerType::kTopP, 0.5f);
  row.pruner.keep_weight = 0.2f;
  row.Run();
  CHECK(row.kept[0] == 0b1010);
  row.pruner.keep_weight = 0.9f;  // takes nothing away
  row.Run();
  CHECK(row.kept[0] == 0b10);
  row.pruner.threshold = 0.95f;
  row.Run();
  CHECK(row.kept[0] == 0b111111);
  // The mass is there already.
  row.pruner.threshold = 0.5f;
  row.pruner.keep_weight = 0.05f;
  row.always = {0b10};
  row.Run();
  CHECK(row.kept[0] == 0b11010);
}

TEST_CASE("What is always kept and the open block count to the mass", "[prune]") {
  Row row = SmallRow({3, 2, 1, 0, 0, 0}, PrunerType::kTopP, 0.6f);
  row.always = {0b1};  // exp(3) of exp(3) + exp(2) + exp(1) + 3 is 61 per cent
  CHECK(row.Run().num_kept == 1);
  row.pruner.threshold = 0.7f;
  row.Run();
  CHECK(row.kept[0] == 0b11);

  row.always.clear();
  row.open = {10};
  const PruneResult result = row.Run();
  CHECK(result.num_kept == 0);
  CHECK(result.max_logit == 10);
  CHECK(result.kept_mass == 1);
}

TEST_CASE("Nothing to prune", "[prune]") {
  Row row;
  row.pruner.type = PrunerType::kTopP;
  row.pruner.threshold = 0.85f;
  row.pruner.min_tokens = 4;
  const PruneResult nothing = row.Run();
  CHECK(nothing.max_logit == -FLT_MAX);
  CHECK(nothing.total_mass == 0);
  CHECK(nothing.kept_mass == 0);
  CHECK(nothing.num_kept == 0);

  row.open = {1, 2};
  const PruneResult open_only = row.Run();
  CHECK(open_only.max_logit == 2);
  CHECK(open_only.total_mass == Approx(1 + std::exp(-1.0)));
  CHECK(open_only.kept_mass == open_only.total_mass);

  row.candidates = {kNoTokens, kNoTokens};
  row.logits.resize(32);
  CHECK(row.Run().num_kept == 0);
  CHECK(row.kept == std::vector<TokenMask>{0, 0});
}

TEST_CASE("No pruner keeps every candidate and still weighs them", "[prune]") {
  Row row = SmallRow({0, -1, -2}, PrunerType::kNone, 0.0f);
  const PruneResult result = row.Run();
  CheckOutputs(row, result);
  CHECK(row.kept == row.candidates);
  CHECK(result.kept_mass == result.total_mass);
}

TEST_CASE("A threshold keeps logits within a distance of the largest", "[prune]") {
  Row row = SmallRow({4, 1, 2, 3.9f, -50, 1.99f}, PrunerType::kThreshold, 2.0f);
  CheckOutputs(row, row.Run());
  CHECK(row.kept[0] == 0b1101);
  row.open = {5};  // the row's largest may be in the open block
  row.Run();
  CHECK(row.kept[0] == 0b1001);
  row.always = {0b10000};
  row.pruner.min_tokens = 4;
  row.Run();
  CHECK(row.kept[0] == 0b11101);
}

TEST_CASE("Logits that are no finite numbers", "[prune]") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Row row = SmallRow({1, kUnread, -kInfinity, 1, -kInfinity}, PrunerType::kTopP, 0.9f);
  PruneResult result = row.Run();
  CHECK(result.total_mass == 2);
  CHECK(row.kept[0] == 0b1001);

  row = SmallRow({1, kInfinity, 2, kUnread}, PrunerType::kTopP, 0.9f);
  result = row.Run();
  CHECK(result.max_logit == FLT_MAX);
  CHECK(result.total_mass == 1);
  CHECK(row.kept[0] == 0b10);
}

}  // namespace
}  // namespace gloam::cpu
