#include "models/attention/policy_json.h"

#include <string>
#include <utility>

#include "catch2/catch.hpp"
#include "kernels/selector.h"

namespace gloam {
namespace {

using nlohmann::json;

ModelConfig TwelveLayers() {
  ModelConfig model;
  model.num_layers = 12;
  model.num_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 64;
  return model;
}

std::shared_ptr<const ChannelTable> SomeChannels(int num_channels) {
  auto table = std::make_shared<ChannelTable>();
  table->num_channels = num_channels;
  return table;
}

StatusOr<std::shared_ptr<const ChannelTable>> AnyFile(const std::string&, std::string_view,
                                                      int num_channels) {
  return SomeChannels(num_channels);
}

StatusOr<SparsityPolicy> Parse(const std::string& text, const FindChannels& channels = AnyFile) {
  return ParsePolicy(json::parse(text), TwelveLayers(), channels);
}

double NumberOf(const SelectorConfig& config, std::string_view name) {
  const auto keys = config.selector->number_keys();
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].name == name) return config.numbers[i];
  }
  FAIL("no key " << name);
  return 0;
}

// The paper's file, as published.
constexpr char kPaperQuest[] = R"({
    "compressor": {
        "type": "none"
    },
    "selector": {
        "type": "quest",
        "token_budget": 8192,
        "chunk_size": 16
    },
    "weight_estimator": {
        "type": "min_max_quant",
        "quant_bit": 4
    },
    "weight_pruner": {
        "type": "top_p",
        "threshold": 0.85
    },
    "skip_first_two_layers": true,
    "use_estimated_weights_in_attn": false
})";

constexpr char kPaperDoubleSparsity[] = R"({
    "compressor": {"type": "none"},
    "selector": {"type": "ds", "quant_bit": 2, "r": 64, "config_path": "/data/some/file.json",
                 "token_budget": 1024, "selected_channel": "q"},
    "weight_estimator": {"type": "none"},
    "weight_pruner": {"type": "none"},
    "skip_first_two_layers": true,
    "use_estimated_weights_in_attn": false
})";

TEST_CASE("The paper's file keeps the paper's meaning") {
  const auto policy = Parse(kPaperQuest);
  REQUIRE(policy.ok());
  CHECK_FALSE(policy->compresses());
  CHECK(policy->selector.selector == FindSelector("quest"));
  CHECK(NumberOf(policy->selector, "token_budget") == 8192);
  CHECK(policy->estimator.type == EstimatorType::kMinMaxQuant);
  CHECK(policy->estimator.quant_bits == 4);
  CHECK(policy->pruner.type == PrunerType::kTopP);
  CHECK(policy->pruner.threshold == 0.85f);
  CHECK(policy->skip_first_two_layers);
  CHECK_FALSE(policy->use_estimated_weights_in_attn);
  // Nothing of ours unless asked for.
  CHECK_FALSE(policy->pruner.share_group);
  CHECK(policy->pruner.min_tokens == 0);
  CHECK(policy->pruner.keep_weight == 0);
  CHECK(policy->tail == TailType::kNone);
  CHECK(policy->sink_tokens == 0);
  CHECK(policy->recent_tokens == 0);
  CHECK(policy->bypass_below_tokens == 0);
  CHECK_FALSE(policy->report_true_mass);
}

TEST_CASE("Double Sparsity asks for its channel file with everything that chooses channels") {
  std::string path, projection;
  const auto table = SomeChannels(64);
  const auto policy = Parse(kPaperDoubleSparsity,
                            [&](const std::string& file, std::string_view which, int num_channels) {
                              path = file;
                              projection = which;
                              CHECK(num_channels == 64);
                              return StatusOr<std::shared_ptr<const ChannelTable>>(table);
                            });
  REQUIRE(policy.ok());
  CHECK(path == "/data/some/file.json");
  CHECK(projection == "q");
  CHECK(policy->selector.channels == table);
  CHECK(NumberOf(policy->selector, "quant_bit") == 2);

  const auto missing = Parse(kPaperDoubleSparsity,
                             [](const auto&...) -> StatusOr<std::shared_ptr<const ChannelTable>> {
                               return NotFound("it is gone");
                             });
  CHECK(missing.status().code() == StatusCode::kNotFound);
  CHECK(PolicyKeyOf(missing.status()) == "selector.config_path");
  CHECK(MessageOf(missing.status()) == "selector.config_path cannot be used: it is gone");
}

TEST_CASE("Absent stages do nothing") {
  const auto policy = Parse("{}");
  REQUIRE(policy.ok());
  CHECK(policy->selector.selector == FindSelector("none"));
  CHECK(policy->estimator.type == EstimatorType::kNone);
  CHECK(policy->pruner.type == PrunerType::kNone);
  CHECK(policy->skip_first_two_layers);
}

// Every key of the format, in one policy or another.
const char* const kFullPolicies[] = {
    kPaperQuest,
    kPaperDoubleSparsity,
    R"({"compressor": {"type": "snap_kv"}})",
    R"({"compressor": {"type": "snap_kv", "window_size": 32, "max_capacity_prompt": 1024,
                       "kernel_size": 7, "pooling": "maxpool"},
        "selector": {"type": "quest", "sparsity_rate": 0.25},
        "weight_estimator": {"type": "block_quant", "quant_bit": 2},
        "weight_pruner": {"type": "threshold", "threshold": 7.3, "min_tokens": 12,
                          "share_group": true},
        "tail": "block_mean", "tail_block": 64, "sink_tokens": 4, "recent_tokens": 32,
        "skip_first_two_layers": false, "use_estimated_weights_in_attn": true,
        "bypass_below_tokens": 1024, "report_true_mass": true})",
    R"({"selector": {"type": "streaming", "num_sinks": 4, "token_budget": 1020}})",
    R"({"selector": {"type": "sparq", "r": 16, "token_budget": 512},
        "weight_estimator": {"type": "max_quant", "quant_bit": 8},
        "weight_pruner": {"type": "top_p", "threshold": 1, "keep_weight": 0.001}})",
    R"({"selector": {"type": "tidal_decode", "reselection_layers": [2, 7], "token_budget": 512}})",
    R"({"selector": {"type": "oracle_topk", "token_budget": 512}})",
};

TEST_CASE("What is written reads as the same policy, and keeps every value that was given") {
  for (const char* text : kFullPolicies) {
    INFO(text);
    const auto policy = Parse(text);
    REQUIRE(policy.ok());
    const json written = PolicyToJson(*policy);
    const auto again = ParsePolicy(written, TwelveLayers(), AnyFile);
    REQUIRE(again.ok());
    CHECK(PolicyToJson(*again) == written);
    const json given = json::parse(text);
    json merged = written;
    merged.merge_patch(given);  // would change what is written otherwise
    CHECK(merged == written);
  }
}

TEST_CASE("Numbers are written as they were meant") {
  const auto policy = Parse(R"({"weight_pruner": {"type": "top_p", "threshold": 0.85}})");
  REQUIRE(policy.ok());
  CHECK(PolicyToJson(*policy)["weight_pruner"]["threshold"].dump() == "0.85");
}

struct Fault {
  const char* text;
  const char* key;
  const char* message;  // part of it
};

TEST_CASE("Faults name the key's path and what it may be") {
  const Fault faults[] = {
      {R"({"select": {}})", "select", "is not a key of a policy, whose keys are bypass_below_tok"},
      {R"({"selector": 5})", "selector", "must be an object"},
      {R"({"selector": null})", "selector", "must be an object"},
      {R"({"selector": {}})", "selector.type", "is missing"},
      {R"({"selector": {"type": "magic"}})", "selector.type", "\"quest\""},
      {R"({"selector": {"type": 5}})", "selector.type", "string"},
      {R"({"selector": {"type": "quest"}})", "selector.token_budget",
       "token_budget or sparsity_rate"},
      {R"({"selector": {"type": "quest", "token_budget": 64, "sparsity_rate": 0.5}})",
       "selector.sparsity_rate", "only one of token_budget or sparsity_rate"},
      {R"({"selector": {"type": "quest", "token_budget": 0}})", "selector.token_budget",
       "must be an integer in [1, 16777216]"},
      {R"({"selector": {"type": "quest", "token_budget": 16777217}})", "selector.token_budget",
       "16777216"},
      {R"({"selector": {"type": "quest", "token_budget": 1.5}})", "selector.token_budget",
       "an integer"},
      {R"({"selector": {"type": "quest", "token_budget": "64"}})", "selector.token_budget",
       "an integer"},
      {R"({"selector": {"type": "quest", "token_budget": true}})", "selector.token_budget",
       "an integer"},
      {R"({"selector": {"type": "quest", "token_budget": null}})", "selector.token_budget",
       "an integer"},
      {R"({"selector": {"type": "quest", "sparsity_rate": 1.5}})", "selector.sparsity_rate", "1]"},
      {R"({"selector": {"type": "quest", "token_budget": 64, "chunk_size": 32}})",
       "selector.chunk_size", "must be 16"},
      {R"({"selector": {"type": "quest", "token_budget": 64, "r": 4}})", "selector.r",
       "the selector \"quest\", whose keys are chunk_size, range_weight, sparsity_rate, "
       "token_budget, type"},
      {R"({"selector": {"type": "quest", "token_budget": 64, "range_weight": 1.5}})",
       "selector.range_weight", "1]"},
      {R"({"selector": {"type": "none", "token_budget": 64}})", "selector.token_budget",
       "the selector \"none\""},
      {R"({"selector": {"type": "ds", "r": 4, "token_budget": 64}})", "selector.config_path",
       "is missing"},
      {R"({"selector": {"type": "ds", "r": 4, "token_budget": 64, "config_path": ""}})",
       "selector.config_path", "not empty"},
      {R"({"selector": {"type": "ds", "token_budget": 64, "config_path": "x"}})", "selector.r",
       "is missing: it must be an integer"},
      {R"({"selector": {"type": "ds", "r": 4, "token_budget": 64, "config_path": "x",
                        "selected_channel": "v"}})",
       "selector.selected_channel", "qk, q, k"},
      {R"({"selector": {"type": "ds", "r": 4, "token_budget": 64, "config_path": "x",
                        "quant_bit": 3}})",
       "selector.quant_bit", "2, 4 or 8"},
      {R"({"selector": {"type": "tidal_decode", "token_budget": 64}})",
       "selector.reselection_layers", "[0, 11]"},
      {R"({"selector": {"type": "tidal_decode", "token_budget": 64,
                        "reselection_layers": [2, 12]}})",
       "selector.reselection_layers", "[0, 11]"},
      {R"({"selector": {"type": "tidal_decode", "token_budget": 64,
                        "reselection_layers": [5, 2]}})",
       "selector.reselection_layers", "ascending"},
      {R"({"compressor": {"type": "h2o"}})", "compressor.type", "\"none\" or \"snap_kv\""},
      {R"({"compressor": {"type": "none", "window_size": 64}})", "compressor.window_size",
       "the compressor \"none\""},
      {R"({"compressor": {"type": "snap_kv", "kernel_size": 4}})", "compressor.kernel_size", "odd"},
      {R"({"compressor": {"type": "snap_kv", "pooling": "mean"}})", "compressor.pooling",
       "\"avgpool\" or \"maxpool\""},
      {R"({"compressor": {"type": "snap_kv", "max_capacity_prompt": 64}})",
       "compressor.max_capacity_prompt", "window_size, which is 64"},
      {R"({"weight_estimator": {"type": "min_max_quant"}})", "weight_estimator.quant_bit",
       "is missing: it must be 2, 4 or 8"},
      {R"({"weight_estimator": {"type": "block_quant", "quant_bit": 3}})",
       "weight_estimator.quant_bit", "2, 4 or 8"},
      {R"({"weight_estimator": {"type": "none", "quant_bit": 4}})", "weight_estimator.quant_bit",
       "is not a key"},
      {R"({"weight_pruner": {"type": "top_p"}})", "weight_pruner.threshold", "is missing"},
      {R"({"weight_pruner": {"type": "top_p", "threshold": 0}})", "weight_pruner.threshold",
       "above 0, at most 1"},
      {R"({"weight_pruner": {"type": "top_p", "threshold": 1e-300}})", "weight_pruner.threshold",
       "above 0"},
      {R"({"weight_pruner": {"type": "top_p", "threshold": 1.01}})", "weight_pruner.threshold",
       "at most 1"},
      {R"({"weight_pruner": {"type": "threshold", "threshold": -1}})", "weight_pruner.threshold",
       "above 0"},
      {R"({"weight_pruner": {"type": "top_p", "threshold": 0.9, "min_tokens": -1}})",
       "weight_pruner.min_tokens", "[0, 16777216]"},
      {R"({"weight_pruner": {"type": "top_p", "threshold": 0.9, "keep_weight": 1.5}})",
       "weight_pruner.keep_weight", "[0, 1]"},
      {R"({"weight_pruner": {"type": "threshold", "threshold": 9, "keep_weight": 0.1}})",
       "weight_pruner.keep_weight", "the weight_pruner \"threshold\""},
      {R"({"weight_pruner": {"type": "none", "threshold": 0.9}})", "weight_pruner.threshold",
       "the weight_pruner \"none\""},
      {R"({"weight_pruner": {"type": "none", "share_group": 1}})", "weight_pruner.share_group",
       "true or false"},
      {R"({"tail": "mean"})", "tail", "\"none\" or \"block_mean\""},
      {R"({"tail": "block_mean"})", "tail", "without a weight_estimator"},
      {R"({"tail_block": 16})", "tail_block", "block_mean"},
      {R"({"weight_estimator": {"type": "block_quant", "quant_bit": 4}, "tail": "block_mean",
           "tail_block": 24})",
       "tail_block", "multiple of 16"},
      {R"({"use_estimated_weights_in_attn": true})", "use_estimated_weights_in_attn",
       "without a weight_estimator"},
      {R"({"sink_tokens": -1})", "sink_tokens", "[0, 16777216]"},
      {R"({"recent_tokens": 0.5})", "recent_tokens", "an integer"},
      {R"({"bypass_below_tokens": 99999999})", "bypass_below_tokens", "[0, 16777216]"},
      {R"({"skip_first_two_layers": 1})", "skip_first_two_layers", "true or false"},
      {R"({"report_true_mass": "yes"})", "report_true_mass", "true or false"},
  };
  for (const Fault& fault : faults) {
    INFO(fault.text);
    const auto policy = Parse(fault.text);
    REQUIRE_FALSE(policy.ok());
    CHECK(policy.status().code() == StatusCode::kInvalidArgument);
    CHECK(PolicyKeyOf(policy.status()) == fault.key);
    const std::string message = MessageOf(policy.status());
    CHECK(message.rfind(fault.key, 0) == 0);
    CHECK_THAT(message, Catch::Matchers::Contains(fault.message));
  }
}

TEST_CASE("A key with odd characters is quoted, not part of a path") {
  const auto policy = Parse("{\"selector\": {\"type\": \"none\", \"a\\nb\": 1}}");
  CHECK(PolicyKeyOf(policy.status()) == "selector");
  CHECK(MessageOf(policy.status()).find('\n') == std::string::npos);
  const auto top = Parse("{\"\\u0007\": 1}");
  REQUIRE_FALSE(top.ok());
  CHECK(PolicyKeyOf(top.status()).empty());
  CHECK_FALSE(ParsePolicy(json::array(), TwelveLayers(), AnyFile).ok());
}

}  // namespace
}  // namespace gloam
