#include "models/attention/policy_registry.h"

#include <algorithm>
#include <span>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "kernels/selector.h"
#include "models/attention/builtin_policies.h"
#include "models/attention/channel_table.h"
#include "models/attention/policy_json.h"
#include "models/attention/sidecar_plan.h"
#include "models/checked_json.h"
#include "models/field_name.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::string_view kFilePrefix = "config_";
constexpr std::string_view kModelMark = "{model}";
constexpr std::string_view kNameKey = "policy";
constexpr std::string_view kBudgetKey = "token_budget";

std::string NameOfStem(std::string_view stem) {
  const bool has_prefix = stem.substr(0, kFilePrefix.size()) == kFilePrefix;
  return std::string(has_prefix ? stem.substr(kFilePrefix.size()) : stem);
}

std::string ReplaceAll(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != text.npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string NamesOf(const std::vector<NamedPolicy>& policies) {
  std::string names;
  for (const NamedPolicy& policy : policies) {
    if (!names.empty()) names += ", ";
    names += policy.name;
  }
  return names;
}

// A fault of start-up as a fault of the request that meets it.
Status AsRequestFault(const Status& status) {
  const std::string key = PolicyKeyOf(status);
  if (status.code() == StatusCode::kInvalidArgument) return status;
  return WithPolicyKey(InvalidArgument("{}", MessageOf(status)), key);
}

Status HasNo(std::string_view policy, std::string_view key, std::string_view what) {
  return PolicyKeyError(key,
                        fmt::format("cannot be set: the policy \"{}\" has no {}", policy, what));
}

// Instead of whichever key sets the budget now.
Status SetTokenBudget(const NamedPolicy& named, int64_t token_budget, json* selector) {
  const std::span<const NumberKey> keys =
      FindSelector((*selector)["type"].get<std::string>())->number_keys();
  const auto budget = std::find_if(keys.begin(), keys.end(),
                                   [](const NumberKey& key) { return key.name == kBudgetKey; });
  if (budget == keys.end()) return HasNo(named.name, kBudgetKey, "token budget");
  if (static_cast<double>(token_budget) < budget->min ||
      static_cast<double>(token_budget) > budget->max) {
    return PolicyKeyError(kBudgetKey,
                          fmt::format("must be an integer in [{}, {}]", budget->min, budget->max));
  }
  if (budget->use == KeyUse::kOneOf) {
    for (const NumberKey& key : keys) {
      if (key.use == KeyUse::kOneOf) selector->erase(std::string(key.name));
    }
  }
  (*selector)[std::string(kBudgetKey)] = token_budget;
  return OkStatus();
}

StatusOr<std::vector<fs::path>> PolicyFilesIn(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> files;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".json" && it->is_regular_file(error)) {
      files.push_back(it->path());
    }
  }
  if (error) return NotFound("--sparsity-dir: cannot read {}", folder.string());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

class PolicyRegistry::Loader {
 public:
  Loader(const PolicyRegistryOptions& options, const ModelConfig& model) : options_(options) {
    registry_.model_ = model;
    registry_.device_ = options.device;
  }

  StatusOr<PolicyRegistry> Run() {
    GLOAM_RETURN_IF_ERROR(ReadFolder());
    for (const BuiltinPolicy& file : BuiltinPolicies()) ReadBuiltin(file);
    GLOAM_RETURN_IF_ERROR(CheckNames());
    Enable();
    GLOAM_RETURN_IF_ERROR(CheckUsable(options_.default_policy, "--sparsity"));
    for (const std::string& name : options_.enabled) {
      GLOAM_RETURN_IF_ERROR(CheckUsable(name, "--sparsity-policies"));
    }
    std::sort(policies_.begin() + 1, policies_.end(),
              [](const NamedPolicy& a, const NamedPolicy& b) { return a.name < b.name; });
    return std::move(registry_);
  }

 private:
  Status ReadFolder() {
    if (options_.folder.empty()) return OkStatus();
    GLOAM_ASSIGN_OR_RETURN(const auto files, PolicyFilesIn(options_.folder));
    for (const fs::path& file : files) {
      GLOAM_ASSIGN_OR_RETURN(json body, ReadJsonFile(file));
      const std::string name = NameOfStem(file.stem().string());
      if (registry_.FindNamed(name) != nullptr) {
        return InvalidArgument("{}: there is already a policy {}", file.string(), QuoteName(name));
      }
      const NamedPolicy& policy = Add(name, std::move(body));
      // A channel file that is not there is a fact of this machine, the rest a fault of the file.
      if (!policy.usable() && policy.unusable.code() != StatusCode::kNotFound) {
        return InvalidArgument("{}: {}", file.string(), MessageOf(policy.unusable));
      }
    }
    return OkStatus();
  }

  void ReadBuiltin(const BuiltinPolicy& file) {
    const std::string name = NameOfStem(file.file_stem);
    if (registry_.FindNamed(name) != nullptr) return;  // the folder's wins
    auto body = ParseJsonObject(file.json, std::string(file.file_stem));
    GLOAM_CHECK(body.ok());
    Add(name, *std::move(body));
  }

  const NamedPolicy& Add(const std::string& name, json body) {
    NamedPolicy& entry = policies_.emplace_back();
    entry.name = name;
    auto parsed =
        ParsePolicy(body, registry_.model_,
                    [this](const std::string& path, std::string_view projection, int num_channels) {
                      return ReadChannels(path, projection, num_channels);
                    });
    if (parsed.ok()) {
      parsed->name = name;
      entry.body = PolicyToJson(*parsed);
      entry.policy = std::make_shared<const SparsityPolicy>(*std::move(parsed));
    } else {
      entry.body = std::move(body);
      entry.unusable = parsed.status();
    }
    return entry;
  }

  // Errors have the path as the policy writes it, not the machine's.
  StatusOr<std::shared_ptr<const ChannelTable>> ReadChannels(const std::string& path,
                                                             std::string_view projection,
                                                             int num_channels) {
    const ChannelKey key(path, projection, num_channels);
    if (const auto loaded = registry_.channels_.find(key); loaded != registry_.channels_.end()) {
      return loaded->second;
    }
    const fs::path relative = ReplaceAll(path, kModelMark, options_.model_name);
    for (const fs::path& folder : {options_.folder, options_.model_folder}) {
      const fs::path file = folder / relative;
      std::error_code error;
      if (folder.empty() || !fs::is_regular_file(file, error)) continue;
      auto table = ReadChannelTable(file, projection, num_channels, registry_.model_);
      if (table.ok()) return registry_.channels_[key] = *std::move(table);
      return InvalidArgument("{}", ReplaceAll(MessageOf(table.status()), file.string(), path));
    }
    return NotFound("there is no such file in --sparsity-dir or beside the model's");
  }

  Status CheckNames() const {
    const auto check = [&](const std::string& name, std::string_view flag) -> Status {
      if (registry_.FindNamed(name) != nullptr) return OkStatus();
      return InvalidArgument("{}: there is no policy {}; there are {}", flag, QuoteName(name),
                             NamesOf(policies_));
    };
    GLOAM_RETURN_IF_ERROR(check(options_.default_policy, "--sparsity"));
    for (const std::string& name : options_.enabled) {
      GLOAM_RETURN_IF_ERROR(check(name, "--sparsity-policies"));
    }
    return OkStatus();
  }

  // Decides which policies can be used, and with it which sidecars are kept.
  void Enable() {
    registry_.default_name_ = options_.default_policy;
    std::vector<std::string> names = {options_.default_policy};
    names.insert(names.end(), options_.enabled.begin(), options_.enabled.end());
    for (NamedPolicy& policy : policies_) {
      if (options_.enabled.empty()) {
        names.push_back(policy.name);
      } else if (policy.name != kDensePolicy &&
                 std::find(names.begin(), names.end(), policy.name) == names.end()) {
        Refuse(PolicyKeyError(kNameKey, "is not enabled by --sparsity-policies"), &policy);
      }
    }
    for (const std::string& name : names) {
      EnableOne(&*std::find_if(policies_.begin(), policies_.end(),
                               [&](const NamedPolicy& policy) { return policy.name == name; }));
    }
  }

  void EnableOne(NamedPolicy* named) {
    if (named->policy == nullptr) return;
    Status status = registry_.CheckRunnable(kNameKey);
    if (status.ok()) status = AddSidecars(*named->policy, &registry_.sidecars_);
    if (!status.ok()) Refuse(std::move(status), named);
  }

  static void Refuse(Status reason, NamedPolicy* named) {
    named->policy = nullptr;
    if (named->usable()) named->unusable = std::move(reason);
  }

  Status CheckUsable(const std::string& name, std::string_view flag) const {
    const NamedPolicy& named = *registry_.FindNamed(name);
    if (named.usable()) return OkStatus();
    return InvalidArgument("{}: the policy {} cannot be used: {}", flag, QuoteName(name),
                           MessageOf(named.unusable));
  }

  const PolicyRegistryOptions& options_;
  PolicyRegistry registry_;
  std::vector<NamedPolicy>& policies_ = registry_.policies_;
};

PolicyRegistry::PolicyRegistry() : default_name_(kDensePolicy) {
  NamedPolicy& dense = policies_.emplace_back();
  dense.name = kDensePolicy;
  SparsityPolicy everything;
  everything.selector.selector = FindSelector("none");
  dense.body = PolicyToJson(everything);
}

StatusOr<PolicyRegistry> PolicyRegistry::Load(const PolicyRegistryOptions& options,
                                              const ModelConfig& model) {
  return Loader(options, model).Run();
}

const NamedPolicy* PolicyRegistry::FindNamed(std::string_view name) const {
  const auto found = std::find_if(policies_.begin(), policies_.end(),
                                  [&](const NamedPolicy& policy) { return policy.name == name; });
  return found == policies_.end() ? nullptr : &*found;
}

// Whether this model on this device runs policies at all; `key`: what is at fault where not.
Status PolicyRegistry::CheckRunnable(std::string_view key) const {
  if (device_ != Device::kCpu) return PolicyKeyError(key, kCpuOnlyPolicy);
  // With a sliding window the oldest tokens are gone: there is little to choose from.
  if (model_.sliding_window == 0) return OkStatus();
  return PolicyKeyError(key, fmt::format("cannot be used with this model, which attends to a "
                                         "sliding window of {} tokens",
                                         model_.sliding_window));
}

StatusOr<std::shared_ptr<const SparsityPolicy>> PolicyRegistry::Find(
    const std::string& name, const PolicyOverrides& overrides) const {
  const NamedPolicy* named = FindNamed(name);
  if (named == nullptr) {
    return PolicyKeyError(kNameKey, fmt::format("must be one of {}", NamesOf(policies_)));
  }
  if (!named->usable()) return AsRequestFault(named->unusable);
  if (overrides.empty()) return named->policy;
  json body = named->body;
  if (overrides.p) {
    json& pruner = body["weight_pruner"];
    if (pruner["type"] != "top_p") return HasNo(name, "p", "top_p pruner");
    // Its own name for the threshold, and the same range.
    if (!(static_cast<float>(*overrides.p) > 0 && *overrides.p <= 1)) {
      return PolicyKeyError("p", "must be a number above 0, at most 1");
    }
    pruner["threshold"] = *overrides.p;
  }
  if (overrides.token_budget) {
    GLOAM_RETURN_IF_ERROR(SetTokenBudget(*named, *overrides.token_budget, &body["selector"]));
  }
  if (overrides.report_true_mass) {
    if (named->policy == nullptr) return HasNo(name, "report_true_mass", "mass to report");
    body["report_true_mass"] = *overrides.report_true_mass;
  }
  GLOAM_ASSIGN_OR_RETURN(SparsityPolicy policy, ParseForRequest(body));
  policy.name = name;
  return std::make_shared<const SparsityPolicy>(std::move(policy));
}

StatusOr<std::shared_ptr<const SparsityPolicy>> PolicyRegistry::Parse(const json& body) const {
  GLOAM_ASSIGN_OR_RETURN(SparsityPolicy policy, ParseForRequest(body));
  return std::make_shared<const SparsityPolicy>(std::move(policy));
}

StatusOr<SparsityPolicy> PolicyRegistry::ParseForRequest(const json& body) const {
  auto policy = ParsePolicy(
      body, model_, [this](const std::string& path, std::string_view projection, int num_channels) {
        return LoadedChannels(path, projection, num_channels);
      });
  if (!policy.ok()) return AsRequestFault(policy.status());
  GLOAM_RETURN_IF_ERROR(CheckRunnable(""));
  GLOAM_RETURN_IF_ERROR(CheckSidecars(*policy, sidecars_));
  return policy;
}

StatusOr<std::shared_ptr<const ChannelTable>> PolicyRegistry::LoadedChannels(
    const std::string& path, std::string_view projection, int num_channels) const {
  const auto found = channels_.find(ChannelKey(path, projection, num_channels));
  if (found != channels_.end()) return found->second;
  return InvalidArgument(
      "no policy of this server has loaded this file with these channels "
      "(GET /v1/sparsity/policies)");
}

}  // namespace gloam
