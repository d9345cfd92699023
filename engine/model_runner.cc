#include "engine/model_runner.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"

namespace gloam {
namespace {

// With report_true_mass, the first sparse token of an answer and then one in so many have their
// true mass measured.
constexpr int kTrueMassInterval = 16;

}  // namespace

ModelRunner::ModelRunner(const ModelRunnerLimits& limits, Model& model,
                         std::span<const KvLayerView> kv,
                         std::span<const SidecarLayerView> sidecars)
    : limits_(limits),
      model_(&model),
      kv_(kv),
      sidecars_(sidecars),
      max_blocks_per_seq_(BlocksFor(limits.max_model_len)),
      block_rows_(limits.max_num_seqs) {
  sparse_first_layers_.seqs = std::make_unique<bool[]>(limits.max_num_seqs);
  sparse_.seqs = std::make_unique<bool[]>(limits.max_num_seqs);
}

StatusOr<ModelRunner> ModelRunner::Create(const ModelRunnerLimits& limits, Ops& ops, Model& model,
                                          std::span<const KvLayerView> kv,
                                          std::span<const SidecarLayerView> sidecars) {
  GLOAM_CHECK(ops.device() == Device::kCpu);  // another device needs staging and copies
  const int max_logit_rows = limits.max_num_seqs + limits.max_score_rows;
  GLOAM_RETURN_IF_ERROR(model.Reserve(limits.max_num_batched_tokens, max_logit_rows));

  ModelRunner runner(limits, model, kv, sidecars);
  const auto allocate = [&ops](auto& array, int64_t num_elements) {
    StatusOr<Buffer> buffer = ops.Allocate(num_elements * sizeof(*array.data()));
    if (buffer.ok()) array.buffer = std::move(buffer).value();
    return buffer.status();
  };
  GLOAM_RETURN_IF_ERROR(allocate(runner.token_ids_, limits.max_num_batched_tokens));
  GLOAM_RETURN_IF_ERROR(allocate(runner.positions_, limits.max_num_batched_tokens));
  GLOAM_RETURN_IF_ERROR(allocate(runner.slot_mapping_, limits.max_num_batched_tokens));
  GLOAM_RETURN_IF_ERROR(allocate(runner.cu_seqlens_, limits.max_num_seqs + 1));
  GLOAM_RETURN_IF_ERROR(allocate(runner.context_lens_, limits.max_num_seqs));
  GLOAM_RETURN_IF_ERROR(
      allocate(runner.block_tables_, int64_t{limits.max_num_seqs} * runner.max_blocks_per_seq_));
  GLOAM_RETURN_IF_ERROR(allocate(runner.logit_rows_, max_logit_rows));
  return runner;
}

ModelRunner::Logits ModelRunner::Forward(const StepPlan& plan) {
  const int num_seqs = static_cast<int>(plan.sequences.size());
  GLOAM_CHECK(num_seqs >= 1 && num_seqs <= limits_.max_num_seqs);
  GLOAM_CHECK(plan.num_tokens <= limits_.max_num_batched_tokens);
  GLOAM_CHECK(plan.num_score_rows <= limits_.max_score_rows);

  int token = 0;
  int score_row = 0;
  int sample_row = plan.num_score_rows;
  for (int row = 0; row < num_seqs; ++row) {
    const ScheduledSequence& scheduled = plan.sequences[row];
    cu_seqlens_.data()[row] = token;
    context_lens_.data()[row] = scheduled.sequence->num_computed + scheduled.num_tokens;
    FillTokens(scheduled, token);
    FillBlockTable(row, scheduled.sequence->table);
    for (int i = 0; i < scheduled.num_score_rows; ++i) {
      logit_rows_.data()[score_row++] = token + scheduled.first_score_row + i;
    }
    token += scheduled.num_tokens;
    if (scheduled.samples) logit_rows_.data()[sample_row++] = token - 1;
  }
  cu_seqlens_.data()[num_seqs] = token;
  GLOAM_CHECK(token == plan.num_tokens);

  ForwardBatch batch;
  batch.seqs = {.num_seqs = num_seqs,
                .num_tokens = plan.num_tokens,
                .max_blocks_per_seq = max_blocks_per_seq_,
                .positions = positions_.data(),
                .slot_mapping = slot_mapping_.data(),
                .cu_seqlens = cu_seqlens_.data(),
                .context_lens = context_lens_.data(),
                .block_tables = block_tables_.data()};
  batch.token_ids = token_ids_.data();
  batch.logit_rows = logit_rows_.data();
  batch.num_logit_rows = plan.num_score_rows + plan.num_sample_rows;
  batch.kv = kv_;
  batch.sidecars = sidecars_;
  FillSparsity(plan);
  batch.sparse_first_layers = sparse_first_layers_.tokens();
  batch.sparse = sparse_.tokens();
  batch.votes = votes_;
  batch.sparse_stats = sparse_stats_.data();
  const TensorView logits = model_->Forward(batch);
  for (const PromptVote& vote : votes_) vote.compressed->complete = true;

  Logits result;
  result.sparsity = {.rows = sparse_.rows,
                     .stats = sparse_stats_.data(),
                     .num_layers = model_->config().num_layers,
                     .num_kv_heads = model_->config().num_kv_heads};
  if (batch.num_logit_rows == 0) return result;
  GLOAM_CHECK(logits.shape[0] == batch.num_logit_rows);
  result.score = logits.Rows(0, plan.num_score_rows);
  result.sample = logits.Rows(plan.num_score_rows, plan.num_sample_rows);
  return result;
}

void ModelRunner::FillSparsity(const StepPlan& plan) {
  sparse_.rows.clear();
  sparse_first_layers_.rows.clear();
  votes_.clear();
  for (size_t seq = 0; seq < plan.sequences.size(); ++seq) {
    const Sequence& sequence = *plan.sequences[seq].sequence;
    const int begin = sequence.num_computed;
    const int end = begin + plan.sequences[seq].num_tokens;
    const int first_token = cu_seqlens_.data()[seq];
    const bool sparse = begin >= sequence.first_sparse_token;
    const bool in_first_layers = sparse && !sequence.policy->skip_first_two_layers;
    sparse_.seqs[seq] = sparse;
    sparse_first_layers_.seqs[seq] = in_first_layers;
    if (sequence.compressed && begin <= sequence.vote_begin &&
        sequence.num_dense_prompt_tokens <= end) {
      votes_.push_back({.seq = static_cast<int>(seq),
                        .first_window_token = first_token + sequence.vote_begin - begin,
                        .config = &sequence.policy->compressor,
                        .compressed = sequence.compressed.get()});
    }
    if (!sparse) continue;
    GLOAM_CHECK(!sidecars_.empty() || SidecarsOf(*sequence.policy).empty());
    for (int position = begin; position < end; ++position) {
      const SparseRow row = {.token = first_token + position - begin,
                             .seq = static_cast<int>(seq),
                             .policy = sequence.policy,
                             .compressed = sequence.compressed.get(),
                             .measure_true_mass = sequence.policy->report_true_mass &&
                                                  (position == sequence.first_sparse_token ||
                                                   position % kTrueMassInterval == 0)};
      sparse_.rows.push_back(row);
      if (in_first_layers) sparse_first_layers_.rows.push_back(row);
    }
  }
  const ModelConfig& config = model_->config();
  sparse_stats_.resize(sparse_.rows.size() * config.num_layers * config.num_kv_heads);
}

void ModelRunner::FillTokens(const ScheduledSequence& scheduled, int first_token) {
  const Sequence& sequence = *scheduled.sequence;
  for (int i = 0; i < scheduled.num_tokens; ++i) {
    const int position = sequence.num_computed + i;
    const int64_t block = sequence.table.blocks[position / kBlockTokens];
    token_ids_.data()[first_token + i] = sequence.tokens[position];
    positions_.data()[first_token + i] = position;
    slot_mapping_.data()[first_token + i] = block * kBlockTokens + position % kBlockTokens;
  }
}

void ModelRunner::FillBlockTable(int row, const BlockTable& table) {
  GLOAM_CHECK(static_cast<int>(table.blocks.size()) <= max_blocks_per_seq_);
  BlockRow& filled = block_rows_[row];
  if (filled.version != table.version) filled = {.version = table.version, .num_blocks = 0};
  int32_t* out = block_tables_.data() + int64_t{row} * max_blocks_per_seq_;
  std::copy(table.blocks.begin() + filled.num_blocks, table.blocks.end(), out + filled.num_blocks);
  filled.num_blocks = table.blocks.size();
}

Status ModelRunner::WarmUp() {
  Sequence sequence;
  sequence.tokens.assign(
      std::min({kBlockTokens, limits_.max_num_batched_tokens, limits_.max_model_len}), 0);
  sequence.table.blocks = {0};
  StepPlan plan;
  plan.num_tokens = static_cast<int>(sequence.tokens.size());
  plan.num_sample_rows = 1;
  plan.sequences.push_back({.sequence = &sequence, .num_tokens = plan.num_tokens, .samples = true});
  const TensorView logits = Forward(plan).sample;
  block_rows_[0] = {};
  const float* row = logits.Data<float>();
  if (!std::all_of(row, row + logits.num_elements(), [](float x) { return std::isfinite(x); })) {
    return Internal("the model's first forward pass gave logits that are not finite");
  }
  return OkStatus();
}

}  // namespace gloam
