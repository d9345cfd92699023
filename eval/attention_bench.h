// Measures decode attention on a recorded profile: dense beside sparse under several policies, with
// time and bytes of every stage. Every sequence of the batch has blocks of its own at random
// places, as in a server whose cache has been in use; all stages run connected.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "eval/attention_profile.h"
#include "kernels/ops.h"
#include "kernels/sparsity_policy.h"
#include "nlohmann/json.hpp"

namespace gloam {

struct AttentionBenchOptions {
  std::vector<int> contexts;  // each at most the profile's
  std::vector<int> batches;   // sequences that decode one token each
  int repeats = 20;           // the median counts
  // Name and policy; null: dense.
  std::vector<std::pair<std::string, std::shared_ptr<const SparsityPolicy>>> policies;
};

// One JSON row per context, batch and policy, means over the profile's layers: microseconds of one
// layer's attention over the whole batch ("us"), of its stages summed over threads ("select_us",
// ...), bytes read per stage, tokens kept per query head and loaded per KV head, and the ratio to
// dense ("speedup"). Errors: kInvalidArgument, kResourceExhausted.
[[nodiscard]] StatusOr<nlohmann::ordered_json> RunAttentionBench(
    const AttentionProfile& profile, Ops& ops, const AttentionBenchOptions& options);

// The rows as a table.
std::string FormatAttentionBench(const nlohmann::ordered_json& rows);

}  // namespace gloam
