// PolicyRegistry: the sparsity policies that requests may name, and the sidecars that the server
// keeps for them. Made once at start-up, then immutable; any thread.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "kernels/sparsity_policy.h"
#include "kernels/tensor_view.h"
#include "models/model_config.h"
#include "nlohmann/json.hpp"

namespace gloam {

inline constexpr std::string_view kDensePolicy = "dense";
// What stands in the way of any other on a GPU.
inline constexpr std::string_view kCpuOnlyPolicy =
    "is served on the CPU only so far (--device cpu); this server runs on a GPU";

struct PolicyRegistryOptions {
  // Folder in which each *.json is a policy, named by the file's stem without a leading "config_";
  // beside the built-in ones, of which it may replace any. Empty: none.
  std::filesystem::path folder;
  std::string default_policy{kDensePolicy};  // of requests that name none
  // Names of the policies that requests may use; empty: every one that this model can use. Dense
  // and the default are always among them.
  std::vector<std::string> enabled;
  // Channel files: "{model}" in their paths stands for `model_name`; a relative path is looked up
  // in `folder`, then in `model_folder`, that of the model's files.
  std::string model_name;
  std::filesystem::path model_folder;
  Device device = Device::kCpu;  // where the model runs; a GPU attends densely so far
};

struct NamedPolicy {
  std::string name;
  nlohmann::json body;  // as PolicyToJson writes it; as its file has it where it could not be read
  std::shared_ptr<const SparsityPolicy> policy;  // null: dense, or not usable
  Status
      unusable;  // why not; PolicyKeyOf gives the key that stands in the way. No paths of the host

  bool usable() const { return unusable.ok(); }
};

// A named policy with changes.
struct PolicyOverrides {
  std::optional<double> p = {};              // weight_pruner.threshold of a top_p pruner
  std::optional<int64_t> token_budget = {};  // the selector's
  std::optional<bool> report_true_mass = {};

  bool empty() const { return !p && !token_budget && !report_true_mass; }
};

class PolicyRegistry {
 public:
  PolicyRegistry();  // dense only

  // Reads the built-in policies (configs/) and the folder's, finds their channel files, and decides
  // what can be used: a channel file that is not there, a model with a sliding window, or a sidecar
  // in another shape than one that an earlier policy needs make a policy unusable, and so does any
  // fault of a built-in one with this model. Earlier are the default, then the enabled ones as
  // listed; without a list the folder's, then the built-in ones.
  // Errors: kInvalidArgument or kNotFound naming the file and the key, or the flag and the policy.
  [[nodiscard]] static StatusOr<PolicyRegistry> Load(const PolicyRegistryOptions& options,
                                                     const ModelConfig& model);

  // Dense first, then the others by name.
  const std::vector<NamedPolicy>& policies() const { return policies_; }
  const std::string& default_name() const { return default_name_; }
  const SidecarConfig& sidecars() const { return sidecars_; }  // what the usable policies need

  // For a request; null: dense. Errors: kInvalidArgument; PolicyKeyOf gives the key's path:
  // "policy" for a name that is unknown or not enabled, "p" and "token_budget" for changes that the
  // policy has no use for, else the key of the policy that is wrong or unusable.
  [[nodiscard]] StatusOr<std::shared_ptr<const SparsityPolicy>> Find(
      const std::string& name, const PolicyOverrides& overrides = {}) const;

  // The policy that a request describes. It may name only channel files that a policy of this
  // registry names, by the same path, and needs no sidecar that is not kept. Errors as above; no
  // file is opened.
  [[nodiscard]] StatusOr<std::shared_ptr<const SparsityPolicy>> Parse(
      const nlohmann::json& body) const;

 private:
  class Loader;  // makes a registry, step by step
  // Path as policies write it, projection, channels per head.
  using ChannelKey = std::tuple<std::string, std::string, int>;

  const NamedPolicy* FindNamed(std::string_view name) const;
  Status CheckRunnable(std::string_view key) const;
  StatusOr<SparsityPolicy> ParseForRequest(const nlohmann::json& body) const;
  StatusOr<std::shared_ptr<const ChannelTable>> LoadedChannels(const std::string& path,
                                                               std::string_view projection,
                                                               int num_channels) const;

  std::vector<NamedPolicy> policies_;
  std::string default_name_;
  SidecarConfig sidecars_;
  ModelConfig model_;
  Device device_ = Device::kCpu;
  std::map<ChannelKey, std::shared_ptr<const ChannelTable>> channels_;
};

}  // namespace gloam
