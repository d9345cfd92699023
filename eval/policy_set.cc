#include "eval/policy_set.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <fstream>

#include "base/check.h"
#include "fmt/ranges.h"
#include "models/attention/builtin_policies.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr std::string_view kConfigPrefix = "config_";

std::string WithoutConfigPrefix(std::string_view stem) {
  if (stem.starts_with(kConfigPrefix)) stem.remove_prefix(kConfigPrefix.size());
  return std::string(stem);
}

bool IsName(std::string_view name) {
  return !name.empty() && name.front() != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
           std::string_view("._@+-").find(c) != std::string_view::npos;
  });
}

// Splits at commas outside braces, brackets and quotes.
std::vector<std::string> SplitEntries(std::string_view text) {
  std::vector<std::string> entries(1);
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted && c == '\\' && i + 1 < text.size()) {
      entries.back() += c;
      entries.back() += text[++i];
      continue;
    }
    if (c == '"') quoted = !quoted;
    if (!quoted && (c == '{' || c == '[')) ++depth;
    if (!quoted && (c == '}' || c == ']')) --depth;
    if (c == ',' && depth <= 0 && !quoted) {
      entries.emplace_back();
    } else {
      entries.back() += c;
    }
  }
  std::erase(entries, "");
  return entries;
}

StatusOr<json> ParseObject(std::string_view text, std::string_view what) {
  json body = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!body.is_object()) return InvalidArgument("--policies: {} is not a JSON object", what);
  return body;
}

StatusOr<EvalPolicy> ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("--policies: cannot read {}", path.string());
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  GLOAM_ASSIGN_OR_RETURN(json body, ParseObject(text, path.string()));
  // Channel files beside the policy's own are meant from there.
  if (body.contains("selector") && body["selector"].is_object()) {
    const auto channels = body["selector"].find("config_path");
    if (channels != body["selector"].end() && channels->is_string()) {
      const auto beside = path.parent_path() / channels->get<std::string>();
      std::error_code error;
      if (std::filesystem::exists(beside, error)) {
        *channels = std::filesystem::absolute(beside).lexically_normal().string();
      }
    }
  }
  return EvalPolicy{.name = WithoutConfigPrefix(path.stem().string()), .body = std::move(body)};
}

// "p=0.7" or "token_budget=1024" applied to `body`.
Status Override(std::string_view change, json& body) {
  const size_t equals = change.find('=');
  const std::string_view key = change.substr(0, equals);
  const std::string_view text = equals == change.npos ? "" : change.substr(equals + 1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    return InvalidArgument("--policies: '{}' is not KEY=NUMBER", change);
  }
  if (key == "p") {
    if (body.is_object() && body.contains("weight_pruner") &&
        body["weight_pruner"].value("type", "") == "top_p") {
      body["weight_pruner"]["threshold"] = value;
      return OkStatus();
    }
  } else if (key == "token_budget") {
    if (body.is_object() && body.contains("selector") &&
        body["selector"].value("type", "none") != "none") {
      body["selector"].erase("sparsity_rate");
      body["selector"]["token_budget"] = static_cast<int64_t>(value);
      return OkStatus();
    }
  } else {
    return InvalidArgument("--policies: '{}' changes neither p nor token_budget", change);
  }
  return InvalidArgument("--policies: '{}' has nothing to change in this policy", change);
}

StatusOr<EvalPolicy> ReadKnown(const std::string& entry, const KnownPolicies& known) {
  const size_t colon = std::min(entry.find(':'), entry.size());
  const auto found = known.find(entry.substr(0, colon));
  if (found == known.end()) {
    std::vector<std::string_view> names;
    for (const auto& [name, _] : known) names.push_back(name);
    return NotFound("--policies: '{}' is no file and none of the policies {}",
                    entry.substr(0, colon), fmt::join(names, ", "));
  }
  EvalPolicy policy{.name = found->first, .body = found->second};
  std::string_view changes = std::string_view(entry).substr(colon);
  while (!changes.empty()) {
    changes.remove_prefix(1);
    const std::string_view change = changes.substr(0, changes.find(':'));
    GLOAM_RETURN_IF_ERROR(Override(change, policy.body));
    policy.name += '-';
    std::copy_if(change.begin(), change.end(), std::back_inserter(policy.name),
                 [](char c) { return c != '='; });
    changes.remove_prefix(change.size());
  }
  return policy;
}

StatusOr<EvalPolicy> ReadEntry(const std::string& entry, const KnownPolicies& known) {
  const size_t brace = entry.find("={");
  if (brace != entry.npos) {
    EvalPolicy policy{.name = entry.substr(0, brace)};
    GLOAM_ASSIGN_OR_RETURN(policy.body, ParseObject(entry.substr(brace + 1), policy.name));
    return policy;
  }
  if (entry.ends_with(".json")) return ReadFile(entry);
  return ReadKnown(entry, known);
}

}  // namespace

bool EvalPolicy::prunes_by_mass() const {
  if (!body.is_object()) return false;
  const auto pruner = body.find("weight_pruner");
  return pruner != body.end() && pruner->is_object() && pruner->value("type", "") == "top_p";
}

KnownPolicies BuiltinEvalPolicies() {
  KnownPolicies known = {{std::string(kDenseRow), nullptr}};
  for (const BuiltinPolicy& policy : BuiltinPolicies()) {
    known[WithoutConfigPrefix(policy.file_stem)] = json::parse(policy.json);
  }
  return known;
}

StatusOr<std::vector<EvalPolicy>> ReadEvalPolicies(std::string_view text,
                                                   const KnownPolicies& known) {
  std::vector<EvalPolicy> policies = {{.name = std::string(kDenseRow)}};
  for (const std::string& entry : SplitEntries(text)) {
    GLOAM_ASSIGN_OR_RETURN(EvalPolicy policy, ReadEntry(entry, known));
    if (policy.dense()) continue;
    if (!IsName(policy.name)) {
      return InvalidArgument(
          "--policies: '{}' cannot name a row: letters, digits and any of \"._@+-\"", policy.name);
    }
    for (const EvalPolicy& other : policies) {
      if (other.name == policy.name) {
        return InvalidArgument("--policies: two entries are named '{}'", policy.name);
      }
    }
    policies.push_back(std::move(policy));
  }
  return policies;
}

EvalPolicy MatchedControl(const EvalPolicy& policy, int token_budget) {
  GLOAM_CHECK(policy.prunes_by_mass());
  json selector = policy.body.value("selector", json::object());
  if (!selector.is_object() || selector.value("type", "none") == "none") {
    selector = {{"type", "quest"}};
  }
  selector.erase("sparsity_rate");
  selector["token_budget"] = token_budget;
  EvalPolicy control{
      .name = fmt::format("{}@{}", selector["type"].get<std::string>(), token_budget),
      .is_control = true};
  control.body = {{"selector", selector}};
  for (const char* key : {"skip_first_two_layers", "bypass_below_tokens"}) {
    if (policy.body.contains(key)) control.body[key] = policy.body[key];
  }
  return control;
}

}  // namespace gloam
