// The policies of an evaluation: read from the command line, and the control rows that belong to
// them. Bodies are JSON as models/attention/policy_json.h describes. Pure but for reading files.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"

namespace gloam {

inline constexpr std::string_view kDenseRow = "dense";

struct EvalPolicy {
  std::string name;     // of its row and its files: letters, digits and "._@+-"
  nlohmann::json body;  // null: dense
  bool is_control = false;

  bool dense() const { return body.is_null(); }
  bool prunes_by_mass() const;  // a top-p pruner: its budget is what it measures
};

using KnownPolicies = std::map<std::string, nlohmann::json>;  // by name; dense's body is null

// The policies that this program was built with.
KnownPolicies BuiltinEvalPolicies();

// `text`: policies with commas between, each one of
//   NAME                 of `known`
//   NAME:p=0.7           the same with changes, ":token_budget=1024" another; named "NAME-p0.7"
//   FILE.json            named by its stem without a leading "config_"
//   LABEL={...}          JSON; commas inside braces and quotes divide nothing
// Dense is put first whether it is listed or not. Errors: kInvalidArgument or kNotFound naming the
// entry; two entries of one name.
[[nodiscard]] StatusOr<std::vector<EvalPolicy>> ReadEvalPolicies(std::string_view text,
                                                                 const KnownPolicies& known);

// The matched-budget control: the policy's selector (quest where it has none) with this fixed
// budget, without estimator, pruner, tail and guards, on the same layers and from the same context
// on; named "quest@146". Only for policies that prune by mass.
EvalPolicy MatchedControl(const EvalPolicy& policy, int token_budget);

}  // namespace gloam
