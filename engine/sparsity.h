// What a request's sparsity policy means to the engine: which of its tokens run sparse, and the
// account of what that did. Engine thread only.
#pragma once

#include <cstdint>
#include <span>

#include "base/status.h"
#include "engine/kv_cache_pool.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "kernels/sparse_attention.h"
#include "models/model_config.h"

namespace gloam {

// Whether the engine can run the request's policy on `device`. Errors: kInvalidArgument.
[[nodiscard]] Status CheckSparsity(const Request& request, Device device, const KvPlan& plan,
                                   int max_prefill_tokens);

// Sets the fields of `sequence` that follow from the request's policy. Tokens run sparse from the
// prompt's end on (less num_decoded_prompt_tokens), once the context has reached the policy's
// bypass_below_tokens.
void SetUpSparsity(const Request& request, const ModelConfig& config, Sequence& sequence);

// What the sparse rows of a step did.
struct StepSparsity {
  std::span<const SparseRow> rows;
  const SparseHeadStats* stats = nullptr;  // [num_layers][rows.size()][num_kv_heads]
  int num_layers = 0;
  int num_kv_heads = 0;

  // Of layer >= kDenseLayers: the layers before them may be dense.
  std::span<const SparseHeadStats> Heads(int layer, size_t row) const {
    return {stats + (layer * rows.size() + row) * num_kv_heads, static_cast<size_t>(num_kv_heads)};
  }
};

// Sums over the decoded tokens of one request.
class SparsityTotals {
 public:
  // Counts row `row`; its means are taken over layers >= kDenseLayers and KV heads.
  void AddSparseStep(const StepSparsity& step, size_t row);
  void AddBypassedSteps(int64_t count) { bypassed_steps_ += count; }

  SparsityUsage Usage(const SparsityPolicy& policy) const;

 private:
  int64_t sparse_steps_ = 0;
  int64_t bypassed_steps_ = 0;
  int64_t true_mass_steps_ = 0;
  double kept_ = 0;
  double loaded_ = 0;
  double loaded_share_ = 0;
  double context_ = 0;
  double true_mass_ = 0;
};

}  // namespace gloam
