// ModelRunner: turns a step's plan into the model's input arrays, which lie in memory that is
// allocated once, and runs the forward pass. On a GPU, steps that only decode are recorded and
// repeated: the batch is padded to one of a few sizes, and everything else is read from the arrays.
// Owned by EngineCore; engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/scheduler.h"
#include "engine/sparsity.h"
#include "engine/staged_block_tables.h"
#include "engine/step_arrays.h"
#include "kernels/ops.h"
#include "models/model.h"

namespace gloam {

struct ModelRunnerLimits {
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  int max_score_rows = 0;
  int max_model_len = 0;
  DType kv_dtype = DType::kBF16;
};

class ModelRunner {
 public:
  // Makes room in `ops` and `model`, which must outlive the runner, for steps within `limits`.
  // Errors: kResourceExhausted.
  [[nodiscard]] static StatusOr<ModelRunner> Create(const ModelRunnerLimits& limits, Ops& ops,
                                                    Model& model);

  // The cache that steps write and read, to be set once, before the first; what the views point to
  // must outlive the runner.
  void SetCache(std::span<const KvLayerView> kv, std::span<const SidecarLayerView> sidecars);

  // Valid until the next Forward.
  struct Result {
    TensorView score;       // [plan.num_score_rows, vocab_size] logits, in the plan's order
    LogitRows sample;       // plan.num_sample_rows, in the plan's order
    StepSparsity sparsity;  // row.seq is an index into the plan's sequences
  };
  // `is_greedy`: the rows that sample will all be greedy (SampleRow::is_greedy). On a GPU, returns
  // when the step is enqueued. Last tokens of sequences may still be unknown
  // (Sequence::drawn_in_row).
  Result Forward(const StepPlan& plan, bool is_greedy = false);

  // Position in its sequence of a token of the last Forward's batch.
  int Position(int token) const { return host_.positions[token]; }

  // Real forward passes over block 0. Errors: kInternal when their logits are not finite.
  [[nodiscard]] Status WarmUp();

 private:
  // The sparse rows of a layer, and which sequences they make up.
  struct SparsePlan {
    std::vector<SparseRow> rows;
    std::unique_ptr<bool[]> seqs;  // [max_num_seqs]
    SparseTokens tokens() const { return {rows, seqs.get()}; }
  };

  ModelRunner(const ModelRunnerLimits& limits, Ops& ops, Model& model, StagedBuffer arrays,
              StagedBlockTables block_tables);
  bool Repeats(const StepPlan& plan) const;
  void FillArrays(const StepPlan& plan, const StepShape& shape);
  void FillTokens(const ScheduledSequence& scheduled, int first_token);
  void FillSparsity(const StepPlan& plan);
  // `token_ids` are the batch's.
  LogitRows RunModel(const ForwardBatch& batch, int32_t* token_ids, bool repeats);
  // One step of `sequence`'s next `num_tokens`.
  LogitRows RunStep(Sequence& sequence, int num_tokens, bool is_greedy);
  bool IsFinite(const TensorView& logits);

  ModelRunnerLimits limits_;
  Ops* ops_;
  Model* model_;
  std::span<const KvLayerView> kv_;
  std::span<const SidecarLayerView> sidecars_;
  StagedBuffer arrays_;
  StepArrays host_;  // of the last step, in `arrays_`
  StagedBlockTables block_tables_;
  std::vector<LogitRows> repeated_logits_;  // of repeated steps, by their key
  SparsePlan sparse_first_layers_;
  SparsePlan sparse_;
  std::vector<PromptVote> votes_;
  std::vector<SparseHeadStats> sparse_stats_;
};

}  // namespace gloam
