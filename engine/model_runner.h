// ModelRunner: turns a step's plan into the model's input arrays, which are allocated once, and
// runs the forward pass. Owned by EngineCore; engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/scheduler.h"
#include "engine/sparsity.h"
#include "kernels/ops.h"
#include "models/model.h"

namespace gloam {

struct ModelRunnerLimits {
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  int max_score_rows = 0;
  int max_model_len = 0;
};

class ModelRunner {
 public:
  // Everything passed by reference must outlive the runner. Errors: kResourceExhausted.
  [[nodiscard]] static StatusOr<ModelRunner> Create(const ModelRunnerLimits& limits, Ops& ops,
                                                    Model& model, std::span<const KvLayerView> kv,
                                                    std::span<const SidecarLayerView> sidecars);

  // Valid until the next Forward.
  struct Logits {
    TensorView score;       // [plan.num_score_rows, vocab_size], in the plan's order
    TensorView sample;      // [plan.num_sample_rows, vocab_size], in the plan's order
    StepSparsity sparsity;  // row.seq is an index into the plan's sequences
  };
  Logits Forward(const StepPlan& plan);

  // Position in its sequence of a token of the last Forward's batch.
  int Position(int token) const { return positions_.data()[token]; }

  // One real forward pass over block 0. Errors: kInternal when its logits are not finite.
  [[nodiscard]] Status WarmUp();

 private:
  // An array in device memory that is filled anew in each step. The CPU backend's memory is the
  // host's, so the host writes it in place.
  template <typename T>
  struct StepArray {
    Buffer buffer;
    T* data() const { return static_cast<T*>(buffer.data()); }
  };
  // What a row of block_tables_ holds already, so that a row that stays only gets its new blocks.
  struct BlockRow {
    uint64_t version = 0;
    size_t num_blocks = 0;
  };

  // The sparse rows of a layer, and which sequences they make up.
  struct SparsePlan {
    std::vector<SparseRow> rows;
    std::unique_ptr<bool[]> seqs;  // [max_num_seqs]
    SparseTokens tokens() const { return {rows, seqs.get()}; }
  };

  ModelRunner(const ModelRunnerLimits& limits, Model& model, std::span<const KvLayerView> kv,
              std::span<const SidecarLayerView> sidecars);
  void FillSparsity(const StepPlan& plan);
  void FillTokens(const ScheduledSequence& scheduled, int first_token);
  void FillBlockTable(int row, const BlockTable& table);

  ModelRunnerLimits limits_;
  Model* model_;
  std::span<const KvLayerView> kv_;
  std::span<const SidecarLayerView> sidecars_;
  int max_blocks_per_seq_;
  StepArray<int32_t> token_ids_;      // [max_num_batched_tokens]
  StepArray<int32_t> positions_;      // [max_num_batched_tokens]
  StepArray<int64_t> slot_mapping_;   // [max_num_batched_tokens]
  StepArray<int32_t> cu_seqlens_;     // [max_num_seqs + 1]
  StepArray<int32_t> context_lens_;   // [max_num_seqs]
  StepArray<int32_t> block_tables_;   // [max_num_seqs, max_blocks_per_seq]
  StepArray<int32_t> logit_rows_;     // [max_num_seqs + max_score_rows], scores first
  std::vector<BlockRow> block_rows_;  // [max_num_seqs]
  SparsePlan sparse_first_layers_;
  SparsePlan sparse_;
  std::vector<PromptVote> votes_;
  std::vector<SparseHeadStats> sparse_stats_;
};

}  // namespace gloam
