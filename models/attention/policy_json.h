// Sparsity policies as JSON: the format of the paper's configuration files, with keys of ours
// beside them (docs/sparsity_policies.md). Read strictly: an unknown key, a value of a wrong type
// or out of range, or stages that cannot go together are errors. Pure functions; any thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"
#include "kernels/sparsity_policy.h"
#include "models/model_config.h"
#include "nlohmann/json.hpp"

namespace gloam {

// Finds the channel table that a policy names: `path` as the policy writes it, one of
// kChannelProjections, channels per head. An error that names no key (PolicyKeyOf) is given the
// key of the path.
using FindChannels = std::function<StatusOr<std::shared_ptr<const ChannelTable>>(
    const std::string& path, std::string_view projection, int num_channels)>;

// The policy that `body` describes, without a name. Absent keys: no compressor, no selector, no
// estimator, no pruner, no tail, no guards, skip_first_two_layers. `model` bounds lists of layers.
// Errors: kInvalidArgument, or what `find_channels` gives; the message begins with the key's path
// ("selector.token_budget must be an integer in [1, 16777216]"), which PolicyKeyOf gives alone.
[[nodiscard]] StatusOr<SparsityPolicy> ParsePolicy(const nlohmann::json& body,
                                                   const ModelConfig& model,
                                                   const FindChannels& find_channels);

// The policy as ParsePolicy reads it, every setting that matters to it spelt out; the name is not
// part of it.
nlohmann::json PolicyToJson(const SparsityPolicy& policy);

// An error about the key with this path: "KEY PROBLEM".
[[nodiscard]] Status PolicyKeyError(std::string_view key, std::string_view problem);

// The error with the path of the key that it is about.
[[nodiscard]] Status WithPolicyKey(Status status, std::string_view key);

// The path of the key that an error is about: "selector.token_budget"; empty where it is about
// none.
std::string PolicyKeyOf(const Status& status);

}  // namespace gloam
