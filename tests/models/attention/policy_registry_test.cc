#include "models/attention/policy_registry.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/selector.h"
#include "models/attention/builtin_policies.h"
#include "models/attention/policy_json.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using Catch::Matchers::Contains;
using nlohmann::json;

ModelConfig Model() {
  ModelConfig model;
  model.num_layers = 3;
  model.num_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 64;
  return model;
}

// A folder of its own, removed at the end.
struct Folder {
  Folder() {
    std::string pattern = fs::temp_directory_path() / "gloam-policies-XXXXXX";
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  ~Folder() { fs::remove_all(path); }

  void Write(const std::string& name, const std::string& text) const {
    fs::create_directories((path / name).parent_path());
    std::ofstream(path / name) << text;
  }

  // Every layer's heads: all channels in ascending order, so that the model's dimension is enough.
  void WriteChannels(const std::string& name) const {
    json file;
    json channels;
    for (int i = 0; i < Model().head_dim; ++i) channels.push_back(i);
    for (int layer = 0; layer < Model().num_layers; ++layer) {
      const std::string key = fmt::format("model.layers.{}.self_attn.q_proj", layer);
      for (int head = 0; head < Model().num_heads; ++head) file[key].push_back(channels);
    }
    Write(name, file.dump());
  }

  fs::path path;
};

PolicyRegistry Load(const PolicyRegistryOptions& options, const ModelConfig& model = Model()) {
  auto registry = PolicyRegistry::Load(options, model);
  INFO(registry.status().ToString());
  REQUIRE(registry.ok());
  return *std::move(registry);
}

const NamedPolicy& Get(const PolicyRegistry& registry, std::string_view name) {
  for (const NamedPolicy& policy : registry.policies()) {
    if (policy.name == name) return policy;
  }
  FAIL("no policy " << name);
  return registry.policies().front();
}

std::string FaultOf(const PolicyRegistryOptions& options) {
  const auto registry = PolicyRegistry::Load(options, Model());
  REQUIRE_FALSE(registry.ok());
  return MessageOf(registry.status());
}

json Estimator(const char* type, int bits) {
  return {{"weight_estimator", {{"type", type}, {"quant_bit", bits}}}};
}

TEST_CASE("Every built-in policy reads, under the paper's file names") {
  std::vector<std::string> stems;
  for (const BuiltinPolicy& file : BuiltinPolicies()) {
    stems.emplace_back(file.file_stem);
    const auto policy =
        ParsePolicy(json::parse(file.json), Model(), [](const auto&, std::string_view, int count) {
          auto table = std::make_shared<ChannelTable>();
          table->num_channels = count;
          return StatusOr<std::shared_ptr<const ChannelTable>>(std::move(table));
        });
    INFO(file.file_stem << policy.status().ToString());
    CHECK(policy.ok());
  }
  for (const char* stem : {"config_quest_1024", "config_quest_8192", "config_quest_twi",
                           "config_ds_1024", "config_ds_8192", "config_ds_twi", "twilight"}) {
    CHECK(std::count(stems.begin(), stems.end(), stem) == 1);
  }
}

TEST_CASE("Without a folder: what needs no channel file can be used, dense is the default") {
  const PolicyRegistry registry = Load({});
  CHECK(registry.policies().front().name == "dense");
  CHECK(registry.default_name() == "dense");
  for (const char* name : {"dense", "twilight", "quest_1024", "quest_8192", "quest_twi"}) {
    CHECK(Get(registry, name).usable());
  }
  for (const char* name : {"ds_1024", "ds_8192", "ds_twi"}) {
    const NamedPolicy& policy = Get(registry, name);
    CHECK_FALSE(policy.usable());
    CHECK(PolicyKeyOf(policy.unusable) == "selector.config_path");
    CHECK(policy.body["selector"]["type"] == "ds");
    const auto found = registry.Find(name);
    CHECK(found.status().code() == StatusCode::kInvalidArgument);  // of the request, not a 404
    CHECK(PolicyKeyOf(found.status()) == "selector.config_path");
  }
  const SidecarConfig& sidecars = registry.sidecars();
  CHECK(sidecars.ranges);
  CHECK(sidecars.block_quant_bits == 4);
  CHECK(sidecars.min_max_quant_bits == 4);
  CHECK(sidecars.max_quant_bits == 0);
  CHECK(sidecars.label_bits == 0);
  CHECK(sidecars.mean_values);
}

TEST_CASE("A registry of dense attention alone keeps no sidecars") {
  const PolicyRegistry registry;
  REQUIRE(registry.policies().size() == 1);
  CHECK(registry.sidecars().empty());
  const auto dense = registry.Find("dense");
  REQUIRE(dense.ok());
  CHECK(*dense == nullptr);
  CHECK(PolicyKeyOf(registry.Find("twilight").status()) == "policy");
}

TEST_CASE("Channel files are found in the folder and beside the model, by the model's name") {
  Folder folder, model;
  folder.WriteChannels("channels/tiny.json");
  PolicyRegistryOptions options;
  options.model_name = "tiny";
  SECTION("in the folder") { options.folder = folder.path; }
  SECTION("beside the model") { options.model_folder = folder.path; }
  const PolicyRegistry registry = Load(options);
  for (const char* name : {"ds_1024", "ds_8192", "ds_twi"}) CHECK(Get(registry, name).usable());
  CHECK(registry.sidecars().label_bits == 2);
  CHECK(registry.sidecars().num_labels() == 64);

  // A request may name what is loaded, and nothing else.
  json body = Get(registry, "ds_1024").body;
  body["selector"]["token_budget"] = 99;
  CHECK(registry.Parse(body).ok());
  for (const char* path : {"/etc/passwd", "channels/tiny.json", "../x.json"}) {
    body["selector"]["config_path"] = path;
    const auto parsed = registry.Parse(body);
    CHECK(PolicyKeyOf(parsed.status()) == "selector.config_path");
    CHECK(parsed.status().code() == StatusCode::kInvalidArgument);
    CHECK(MessageOf(parsed.status()).find(path) == std::string::npos);
  }
}

TEST_CASE("A channel file that does not fit makes a built-in policy unusable, by its own path") {
  Folder folder;
  folder.Write("channels/tiny.json", "{}");
  PolicyRegistryOptions options;
  options.folder = folder.path;
  options.model_name = "tiny";
  const NamedPolicy policy = Get(Load(options), "ds_twi");
  CHECK(PolicyKeyOf(policy.unusable) == "selector.config_path");
  CHECK_THAT(MessageOf(policy.unusable), Contains("channels/{model}.json"));
  CHECK(MessageOf(policy.unusable).find(folder.path.string()) == std::string::npos);
}

TEST_CASE("A folder adds policies and replaces built-in ones") {
  Folder folder;
  folder.Write("mine.json", R"({"selector": {"type": "oracle_topk", "token_budget": 64}})");
  folder.Write("config_quest_twi.json", R"({"selector": {"type": "quest", "token_budget": 32}})");
  folder.Write("notes.txt", "not a policy");
  PolicyRegistryOptions options;
  options.folder = folder.path;
  options.default_policy = "mine";
  const PolicyRegistry registry = Load(options);
  CHECK(registry.default_name() == "mine");
  const auto mine = registry.Find("mine");
  REQUIRE(mine.ok());
  CHECK((*mine)->name == "mine");
  CHECK((*mine)->selector.selector == FindSelector("oracle_topk"));
  CHECK(Get(registry, "quest_twi").body["selector"]["token_budget"] == 32);
}

TEST_CASE("A paper's file with a channel file of another machine is listed, not an error") {
  Folder folder;
  folder.Write("config_ds_mine.json",
               R"({"selector": {"type": "ds", "quant_bit": 2, "r": 8, "token_budget": 1024,
                   "config_path": "/nowhere/file.json", "selected_channel": "q"}})");
  PolicyRegistryOptions options;
  options.folder = folder.path;
  CHECK_FALSE(Get(Load(options), "ds_mine").usable());
}

TEST_CASE("Faults of the folder name file and key") {
  Folder folder;
  PolicyRegistryOptions options;
  options.folder = folder.path;
  SECTION("an impossible value") {
    folder.Write("bad.json", R"({"selector": {"type": "quest", "token_budget": 0}})");
    CHECK_THAT(FaultOf(options), Contains("bad.json: selector.token_budget must be"));
  }
  SECTION("bad JSON") {
    folder.Write("bad.json", "{");
    CHECK_THAT(FaultOf(options), Contains("bad.json"));
  }
  SECTION("a key that is there twice") {
    folder.Write("bad.json", R"({"sink_tokens": 1, "sink_tokens": 2})");
    CHECK_THAT(FaultOf(options), Contains("bad.json") && Contains("twice"));
  }
  SECTION("dense is not to be replaced") {
    folder.Write("dense.json", "{}");
    CHECK_THAT(FaultOf(options), Contains("dense.json: there is already a policy 'dense'"));
  }
  SECTION("two files of one name") {
    folder.Write("a.json", "{}");
    folder.Write("config_a.json", "{}");
    CHECK_THAT(FaultOf(options), Contains("already a policy 'a'"));
  }
  SECTION("a channel file that does not fit") {
    folder.Write("c/x.json", "[]");
    folder.Write("bad.json", R"({"selector": {"type": "ds", "r": 8, "token_budget": 64,
                                              "config_path": "c/x.json"}})");
    CHECK_THAT(FaultOf(options), Contains("bad.json: selector.config_path"));
  }
  SECTION("no folder") {
    options.folder = folder.path / "none";
    CHECK_THAT(FaultOf(options), Contains("--sparsity-dir"));
  }
}

TEST_CASE("Only enabled policies can be used, and only their sidecars are kept") {
  PolicyRegistryOptions options;
  options.enabled = {"quest_1024"};
  const PolicyRegistry registry = Load(options);
  CHECK(Get(registry, "quest_1024").usable());
  CHECK(Get(registry, "dense").usable());
  for (const char* name : {"twilight", "quest_8192", "ds_twi"}) {
    CHECK_FALSE(Get(registry, name).usable());
  }
  CHECK(PolicyKeyOf(registry.Find("twilight").status()) == "policy");
  CHECK_THAT(MessageOf(registry.Find("twilight").status()), Contains("--sparsity-policies"));
  CHECK(registry.sidecars().ranges);
  CHECK(registry.sidecars().block_quant_bits == 0);
  CHECK_FALSE(registry.sidecars().mean_values);

  options.enabled = {"dense"};
  CHECK(Load(options).sidecars().empty());
  options.default_policy = "quest_1024";  // enabled by being the default
  CHECK(Get(Load(options), "quest_1024").usable());
}

TEST_CASE("Options that name no policy, or one that cannot be used, are errors") {
  PolicyRegistryOptions options;
  options.default_policy = "magic";
  CHECK_THAT(FaultOf(options), Contains("--sparsity: there is no policy 'magic'; there are dense"));
  options.default_policy = "ds_twi";
  CHECK_THAT(FaultOf(options), Contains("--sparsity: the policy 'ds_twi' cannot be used"));
  options.default_policy = "dense";
  options.enabled = {"quest_twi", "magic"};
  CHECK_THAT(FaultOf(options), Contains("--sparsity-policies: there is no policy 'magic'"));
  options.enabled = {"ds_twi"};
  CHECK_THAT(FaultOf(options), Contains("--sparsity-policies: the policy 'ds_twi'"));
}

TEST_CASE("Of two shapes of one sidecar the first is kept") {
  Folder folder;
  folder.Write("two_bits.json", Estimator("block_quant", 2).dump());
  PolicyRegistryOptions options;
  options.folder = folder.path;
  {
    const PolicyRegistry registry = Load(options);  // the folder's come before the built-in ones
    CHECK(registry.sidecars().block_quant_bits == 2);
    CHECK(Get(registry, "two_bits").usable());
    const NamedPolicy& twilight = Get(registry, "twilight");
    CHECK_FALSE(twilight.usable());
    CHECK(PolicyKeyOf(twilight.unusable) == "weight_estimator.quant_bit");
    CHECK_THAT(MessageOf(twilight.unusable), Contains("must be 2"));
    CHECK(Get(registry, "quest_twi").usable());
  }
  options.default_policy = "twilight";  // and the default before them
  const PolicyRegistry registry = Load(options);
  CHECK(Get(registry, "twilight").usable());
  CHECK_FALSE(Get(registry, "two_bits").usable());
  CHECK(registry.sidecars().block_quant_bits == 4);
}

TEST_CASE("A model with a sliding window attends densely") {
  ModelConfig model = Model();
  model.sliding_window = 4096;
  const PolicyRegistry registry = Load({}, model);
  CHECK(registry.sidecars().empty());
  CHECK(registry.Find("dense").ok());
  const auto named = registry.Find("twilight");
  CHECK(PolicyKeyOf(named.status()) == "policy");
  CHECK_THAT(MessageOf(named.status()), Contains("sliding window of 4096 tokens"));
  const auto own = registry.Parse(json::parse(R"({"sink_tokens": 4})"));
  CHECK_THAT(MessageOf(own.status()), Contains("sliding window"));
}

TEST_CASE("A policy of a request's own needs what the server keeps") {
  PolicyRegistryOptions options;
  options.enabled = {"twilight"};  // ranges, block_quant of 4 bits, mean values
  const PolicyRegistry registry = Load(options);
  CHECK(registry.Parse(Estimator("block_quant", 4)).ok());
  const auto own = registry.Parse(json::parse(R"({"selector": {"type": "quest",
                                                              "token_budget": 64}})"));
  REQUIRE(own.ok());
  CHECK((*own)->name.empty());

  const auto other_bits = registry.Parse(Estimator("block_quant", 8));
  CHECK(PolicyKeyOf(other_bits.status()) == "weight_estimator.quant_bit");
  CHECK_THAT(MessageOf(other_bits.status()), Contains("must be 4") && Contains("--sparsity-pol"));
  const auto not_kept = registry.Parse(Estimator("min_max_quant", 4));
  CHECK(PolicyKeyOf(not_kept.status()) == "weight_estimator.type");
  CHECK_THAT(MessageOf(not_kept.status()), Contains("--sparsity-policies"));

  options.enabled = {"dense"};
  const PolicyRegistry bare = Load(options);
  const auto ranges = bare.Parse(json::parse(R"({"selector": {"type": "quest",
                                                             "token_budget": 64}})"));
  CHECK(PolicyKeyOf(ranges.status()) == "selector.type");
  CHECK(
      bare.Parse(json::parse(R"({"selector": {"type": "oracle_topk", "token_budget": 8}})")).ok());
}

TEST_CASE("Overrides change p and the token budget of the policies that have them") {
  Folder folder;
  folder.Write("no_selector.json", Estimator("block_quant", 4).dump());
  PolicyRegistryOptions options;
  options.folder = folder.path;
  const PolicyRegistry registry = Load(options);
  PolicyOverrides overrides;
  overrides.p = 0.5;
  overrides.token_budget = 512;
  overrides.report_true_mass = true;
  const auto policy = registry.Find("quest_twi", overrides);
  REQUIRE(policy.ok());
  CHECK((*policy)->name == "quest_twi");
  CHECK((*policy)->pruner.threshold == 0.5f);
  CHECK((*policy)->report_true_mass);
  CHECK(PolicyToJson(**policy)["selector"]["token_budget"] == 512);
  // The named one is as it was.
  CHECK((*registry.Find("quest_twi"))->pruner.threshold == 0.85f);

  const auto key = [&](const char* name, const PolicyOverrides& changes) {
    return PolicyKeyOf(registry.Find(name, changes).status());
  };
  PolicyOverrides p, budget, mass;
  p.p = 0.9;
  budget.token_budget = 64;
  mass.report_true_mass = true;
  CHECK(key("dense", p) == "p");
  CHECK(key("quest_1024", p) == "p");
  CHECK(key("dense", budget) == "token_budget");
  CHECK(key("no_selector", budget) == "token_budget");
  CHECK(key("dense", mass) == "report_true_mass");
  for (const double wrong : {0.0, -1.0, 1.5, std::nan("")}) {
    p.p = wrong;
    CHECK(key("quest_twi", p) == "p");
  }
  for (const int64_t wrong : {int64_t{0}, int64_t{-5}, int64_t{1} << 40}) {
    budget.token_budget = wrong;
    CHECK(key("quest_twi", budget) == "token_budget");
  }
}

TEST_CASE("A token budget takes the place of a sparsity rate") {
  Folder folder;
  folder.Write("rate.json", R"({"selector": {"type": "quest", "sparsity_rate": 0.5}})");
  PolicyRegistryOptions options;
  options.folder = folder.path;
  PolicyOverrides overrides;
  overrides.token_budget = 512;
  const auto policy = Load(options).Find("rate", overrides);
  REQUIRE(policy.ok());
  const json selector = PolicyToJson(**policy)["selector"];
  CHECK(selector["token_budget"] == 512);
  CHECK_FALSE(selector.contains("sparsity_rate"));
}

TEST_CASE("On a GPU dense alone is served") {
  PolicyRegistryOptions options;
  options.device = Device::kCuda;
  const PolicyRegistry registry = Load(options);
  CHECK(registry.sidecars().empty());
  for (const NamedPolicy& policy : registry.policies()) {
    CAPTURE(policy.name);
    CHECK(policy.usable() == (policy.name == kDensePolicy));
  }
  CHECK(*registry.Find("dense") == nullptr);
  const auto named = registry.Find("quest_twi");
  CHECK(named.status().code() == StatusCode::kInvalidArgument);
  CHECK(PolicyKeyOf(named.status()) == "policy");
  CHECK_THAT(MessageOf(named.status()), Contains("served on the CPU only so far"));
  const auto given = registry.Parse(Get(registry, "quest_twi").body);
  CHECK(PolicyKeyOf(given.status()).empty());
  CHECK_THAT(MessageOf(given.status()), Contains("served on the CPU only so far"));
  options.default_policy = "quest_twi";
  CHECK_THAT(FaultOf(options), Contains("--sparsity") && Contains("--device cpu"));
}

}  // namespace
}  // namespace gloam
