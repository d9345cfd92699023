// `gloam bench attention`: stages of decode attention on real queries and keys.
#include <algorithm>
#include <iostream>
#include <numeric>

#include "eval/attention_bench.h"
#include "eval/profiling_ops.h"
#include "models/attention/policy_registry.h"
#include "models/catalog.h"
#include "server/cli/cli.h"
#include "server/cli/text_files.h"

namespace gloam {
namespace {

// Layers spread over the model, the first two aside.
std::vector<int> SpreadLayers(int num_layers, int count) {
  std::vector<int> layers;
  const int usable = std::max(1, num_layers - kDenseLayers);
  for (int i = 0; i < std::min(count, usable); ++i) {
    layers.push_back(num_layers - usable + (2 * i + 1) * usable / (2 * std::min(count, usable)));
  }
  return layers;
}

StatusOr<AttentionProfile> Record(const BenchAttentionOptions& options, ModelConfig& config) {
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(options.model.name));
  if (!resolved.present) {
    const std::string& name = options.model.name;
    return NotFound("{} is not here yet: gloam pull {}", name, name);
  }
  if (options.texts.empty()) {
    return InvalidArgument("--text is needed: attention is measured on a run over real text");
  }
  const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = options.model.settings.threads});
  ProfilingOps profiling(*ops);
  GLOAM_ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModel(resolved.path, profiling, {}));
  config = loaded.model->config();
  const int context = *std::max_element(options.contexts.begin(), options.contexts.end());
  GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                         TokenizeFiles(options.texts, *loaded.tokenizer, context));
  ProfileOptions profile;
  profile.context = context;
  profile.layers = options.layers.empty() ? SpreadLayers(config.num_layers, 6) : options.layers;
  return RecordProfile(*loaded.model, profiling, tokens, profile);
}

// What policies need to know of the model that a profile comes from.
ModelConfig ConfigOf(const AttentionProfile& profile) {
  ModelConfig config;
  config.num_heads = profile.num_heads;
  config.num_kv_heads = profile.kv.num_kv_heads;
  config.head_dim = profile.kv.head_dim;
  for (const auto& layer : profile.layers) {
    config.num_layers = std::max(config.num_layers, layer.layer + 1);
  }
  return config;
}

Status RunStages(const BenchAttentionOptions& options) {
  ModelConfig config;
  AttentionProfile profile;
  if (!options.replay.empty()) {
    GLOAM_ASSIGN_OR_RETURN(profile, LoadProfile(options.replay));
    config = ConfigOf(profile);
  } else {
    GLOAM_ASSIGN_OR_RETURN(profile, Record(options, config));
  }
  if (!options.record.empty()) GLOAM_RETURN_IF_ERROR(SaveProfile(profile, options.record));

  PolicyRegistryOptions policies;
  policies.folder = options.model.settings.sparsity_dir;
  for (const std::string& name : options.policies) {
    if (name != kDensePolicy) policies.enabled.push_back(name);
  }
  GLOAM_ASSIGN_OR_RETURN(const PolicyRegistry registry, PolicyRegistry::Load(policies, config));
  AttentionBenchOptions bench;
  bench.contexts = options.contexts;
  bench.batches = options.batches;
  bench.repeats = options.repeats;
  bench.policies.emplace_back(kDensePolicy, nullptr);
  for (const std::string& name : policies.enabled) {
    GLOAM_ASSIGN_OR_RETURN(auto policy, registry.Find(name));
    bench.policies.emplace_back(name, std::move(policy));
  }
  const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = options.model.settings.threads});
  GLOAM_ASSIGN_OR_RETURN(const nlohmann::ordered_json rows,
                         RunAttentionBench(profile, *ops, bench));
  if (options.json) {
    std::cout << rows.dump(1) << '\n';
  } else {
    std::cout << FormatAttentionBench(rows);
  }
  return OkStatus();
}

}  // namespace

int RunBenchAttention(const BenchAttentionOptions& options) {
  const bool is_dense = !options.model.random_weights.empty();
  const Status status = is_dense ? RunBenchDenseAttention(options) : RunStages(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace gloam
