#include "eval/policy_set.h"

#include "catch2/catch.hpp"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

const KnownPolicies kKnown = {
    {"dense", nullptr},
    {"twi",
     {{"selector", {{"type", "quest"}, {"sparsity_rate", 0.25}, {"chunk_size", 16}}},
      {"weight_estimator", {{"type", "block_quant"}}},
      {"weight_pruner", {{"type", "top_p"}, {"threshold", 0.85}}},
      {"sink_tokens", 4},
      {"bypass_below_tokens", 100}}},
    {"bare", {{"weight_pruner", {{"type", "top_p"}, {"threshold", 0.85}}}}},
    {"quest", {{"selector", {{"type", "quest"}, {"token_budget", 64}}}}}};

std::string ErrorOf(std::string_view text) {
  return MessageOf(ReadEvalPolicies(text, kKnown).status());
}

TEST_CASE("Policies come by name, with changes, inline and from files, after dense") {
  const test::TempFolder folder;
  const std::string file = (folder.path() / "config_mine.json").string();
  test::WriteFile(file, R"({"selector": {"type": "ds", "config_path": "channels.json"}})");
  test::WriteFile(folder.path() / "channels.json", "{}");
  const auto policies = ReadEvalPolicies(
      R"(quest,twi:p=0.5:token_budget=128,own={"a": [1, 2], "b": "},{"},dense,)" + file, kKnown);
  INFO(policies.status());
  REQUIRE(policies.ok());
  REQUIRE(policies->size() == 5);
  const auto& all = *policies;
  CHECK(all[0].name == "dense");
  CHECK(all[0].dense());
  CHECK(all[1].name == "quest");
  CHECK(all[2].name == "twi-p0.5-token_budget128");
  CHECK(all[2].body["weight_pruner"]["threshold"] == 0.5);
  CHECK(all[2].body["selector"]["token_budget"] == 128);
  CHECK_FALSE(all[2].body["selector"].contains("sparsity_rate"));
  CHECK(all[3].name == "own");
  CHECK(all[3].body == json::parse(R"({"a": [1, 2], "b": "},{"})"));
  CHECK(all[4].name == "mine");
  CHECK(all[4].body["selector"]["config_path"] == (folder.path() / "channels.json").string());
}

TEST_CASE("What is wrong with a list of policies is said") {
  CHECK(ErrorOf("nonsense").find("'nonsense'") != std::string::npos);
  CHECK(ErrorOf("twi:q=1").find("'q=1'") != std::string::npos);
  CHECK(ErrorOf("twi:p=x").find("'p=x'") != std::string::npos);
  CHECK(ErrorOf("quest:p=0.5").find("'p=0.5'") != std::string::npos);
  CHECK(ErrorOf("bare:token_budget=9").find("'token_budget=9'") != std::string::npos);
  CHECK(ErrorOf("quest,quest").find("two entries") != std::string::npos);
  CHECK(ErrorOf("own={1}").find("own") != std::string::npos);
  CHECK(ErrorOf("a/b={}").find("a/b") != std::string::npos);
  CHECK(ErrorOf("missing.json").find("missing.json") != std::string::npos);
}

TEST_CASE("The control has the policy's selector, a fixed budget, and nothing else") {
  const auto policies = *ReadEvalPolicies("twi,bare,quest", kKnown);
  CHECK(policies[1].prunes_by_mass());
  CHECK_FALSE(policies[0].prunes_by_mass());
  CHECK_FALSE(policies[3].prunes_by_mass());
  const EvalPolicy control = MatchedControl(policies[1], 146);
  CHECK(control.name == "quest@146");
  CHECK(control.is_control);
  CHECK(control.body ==
        json{{"selector", {{"type", "quest"}, {"token_budget", 146}, {"chunk_size", 16}}},
             {"bypass_below_tokens", 100}});
  CHECK(MatchedControl(policies[2], 9).body ==
        json{{"selector", {{"type", "quest"}, {"token_budget", 9}}}});
}

TEST_CASE("The built-in policies are there") {
  const KnownPolicies known = BuiltinEvalPolicies();
  CHECK(known.contains("dense"));
  CHECK(known.contains("quest_twi"));
  CHECK(known.contains("twilight"));
}

}  // namespace
}  // namespace gloam
