// The two ways in which `gloam eval` has its prompts answered: by a model in this process, and by a
// server over HTTP (eval/generator.h).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "eval/generator.h"
#include "eval/policy_set.h"
#include "server/cli/options.h"

namespace gloam {

// Loads the model of `options` with the sidecars that `policies` read, and those of their controls.
// Errors: LocalModel::Load's, among them policies that cannot go together in one process.
[[nodiscard]] StatusOr<std::unique_ptr<TextGenerator>> MakeLocalGenerator(
    ServeOptions options, const std::vector<EvalPolicy>& policies);

// Errors: kInvalidArgument (url), kUnavailable.
[[nodiscard]] StatusOr<std::unique_ptr<TextGenerator>> MakeHttpGenerator(
    const std::string& url, const std::string& api_key);

// The policies that a server offers, by name. Errors: as above.
[[nodiscard]] StatusOr<KnownPolicies> FetchPolicies(const std::string& url,
                                                    const std::string& api_key);

}  // namespace gloam
