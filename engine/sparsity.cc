#include "engine/sparsity.h"

#include <algorithm>
#include <memory>

#include "models/attention/policy_json.h"
#include "models/attention/policy_registry.h"

namespace gloam {

Status CheckSparsity(const Request& request, Device device, const KvPlan& plan,
                     int max_prefill_tokens) {
  const auto num_prompt = static_cast<int>(request.prompt.size());
  if (request.num_decoded_prompt_tokens < 0 || request.num_decoded_prompt_tokens >= num_prompt) {
    return InvalidArgument("{} decoded prompt tokens are not in [0, {}), the prompt's length",
                           request.num_decoded_prompt_tokens, num_prompt);
  }
  if (request.sparsity == nullptr) return OkStatus();
  if (device != Device::kCpu) return PolicyKeyError("policy", kCpuOnlyPolicy);
  const SparsityPolicy& policy = *request.sparsity;
  if (!Covers(plan.sidecars, SidecarsOf(policy))) {
    return InvalidArgument("the policy \"{}\" reads sidecars that this engine does not keep",
                           policy.name);
  }
  if (!policy.compresses()) return OkStatus();
  if (policy.compressor.window_size > max_prefill_tokens) {
    return PolicyKeyError(
        "compressor.window_size",
        fmt::format("must be at most {}, the prompt tokens that a step is sure to have room for "
                    "(--max-num-batched-tokens less --max-num-seqs), got {}",
                    max_prefill_tokens, policy.compressor.window_size));
  }
  if (request.sampling.num_prompt_logprobs >= 0) {
    return PolicyKeyError("compressor.type",
                          "must be \"none\" for a request with prompt log-probabilities");
  }
  return OkStatus();
}

void SetUpSparsity(const Request& request, const ModelConfig& config, Sequence& sequence) {
  if (request.sparsity == nullptr) return;
  const SparsityPolicy& policy = *request.sparsity;
  const int num_dense = sequence.num_prompt_tokens - request.num_decoded_prompt_tokens;
  sequence.policy = &policy;
  // The token at position p has a context of p + 1 tokens.
  sequence.first_sparse_token = std::max(num_dense, policy.bypass_below_tokens - 1);
  sequence.num_dense_prompt_tokens = num_dense;
  if (!policy.compresses() || num_dense <= policy.compressor.max_capacity_prompt) return;
  sequence.vote_begin = num_dense - policy.compressor.window_size;
  sequence.compressed = std::make_unique<CompressedPrompt>();
  sequence.compressed->num_blocks = BlocksFor(num_dense);
  sequence.compressed->num_kv_heads = config.num_kv_heads;
  sequence.compressed->masks.resize(int64_t{config.num_layers} * config.num_kv_heads *
                                    sequence.compressed->num_blocks);
}

void SparsityTotals::AddSparseStep(const StepSparsity& step, size_t row) {
  double kept = 0;
  double loaded = 0;
  double true_mass = 0;
  int num_heads = 0;
  int context = 0;
  for (int layer = kDenseLayers; layer < step.num_layers; ++layer) {
    for (const SparseHeadStats& head : step.Heads(layer, row)) {
      kept += head.kept;
      loaded += head.loaded;
      true_mass += head.true_mass;
      context = head.context;
      ++num_heads;
    }
  }
  ++sparse_steps_;
  if (num_heads == 0) return;
  kept_ += kept / num_heads;
  loaded_ += loaded / num_heads;
  loaded_share_ += loaded / num_heads / context;
  context_ += context;
  if (step.rows[row].measure_true_mass) {
    ++true_mass_steps_;
    true_mass_ += true_mass / num_heads;
  }
}

SparsityUsage SparsityTotals::Usage(const SparsityPolicy& policy) const {
  SparsityUsage usage;
  usage.policy = policy.name;
  usage.sparse_steps = sparse_steps_;
  usage.bypassed_steps = bypassed_steps_;
  if (sparse_steps_ > 0) {
    const auto steps = static_cast<double>(sparse_steps_);
    usage.kept_tokens_per_head = kept_ / steps;
    usage.loaded_tokens_per_kv_head = loaded_ / steps;
    usage.loaded_share = loaded_share_ / steps;
    usage.context_tokens = context_ / steps;
  }
  if (true_mass_steps_ > 0) usage.true_mass = true_mass_ / static_cast<double>(true_mass_steps_);
  return usage;
}

}  // namespace gloam
