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

uint64_t RepeatKey(int num_seqs, bool is_greedy) {
  return 2 * static_cast<uint64_t>(num_seqs) + (is_greedy ? 1 : 0);
}

}  // namespace

ModelRunner::ModelRunner(const ModelRunnerLimits& limits, Ops& ops, Model& model,
                         StagedBuffer arrays, StagedBlockTables block_tables)
    : limits_(limits),
      ops_(&ops),
      model_(&model),
      arrays_(std::move(arrays)),
      block_tables_(std::move(block_tables)),
      repeated_logits_(RepeatKey(limits.max_num_seqs, true) + 1) {
  sparse_first_layers_.seqs = std::make_unique<bool[]>(limits.max_num_seqs);
  sparse_.seqs = std::make_unique<bool[]>(limits.max_num_seqs);
}

StatusOr<ModelRunner> ModelRunner::Create(const ModelRunnerLimits& limits, Ops& ops, Model& model) {
  const StepShape largest = {.num_seqs = limits.max_num_seqs,
                             .num_tokens = limits.max_num_batched_tokens,
                             .num_logit_rows = limits.max_num_seqs + limits.max_score_rows};
  const ModelConfig& config = model.config();
  GLOAM_RETURN_IF_ERROR(model.Reserve(largest.num_tokens, largest.num_logit_rows));
  GLOAM_RETURN_IF_ERROR(ops.Reserve({.max_tokens = largest.num_tokens,
                                     .max_seqs = largest.num_seqs,
                                     .max_context = limits.max_model_len,
                                     .max_logit_rows = largest.num_logit_rows,
                                     .num_heads = config.num_heads,
                                     .num_kv_heads = config.num_kv_heads,
                                     .head_dim = config.head_dim,
                                     .hidden_size = config.hidden_size,
                                     .intermediate_size = config.intermediate_size,
                                     .vocab_size = config.vocab_size,
                                     .kv_dtype = limits.kv_dtype}));
  GLOAM_ASSIGN_OR_RETURN(StagedBuffer arrays,
                         ops.AllocateStaged(StepArrays::At(nullptr, largest).bytes));
  GLOAM_ASSIGN_OR_RETURN(
      StagedBlockTables block_tables,
      StagedBlockTables::Create(ops, limits.max_num_seqs, BlocksFor(limits.max_model_len)));
  return ModelRunner(limits, ops, model, std::move(arrays), std::move(block_tables));
}

void ModelRunner::SetCache(std::span<const KvLayerView> kv,
                           std::span<const SidecarLayerView> sidecars) {
  kv_ = kv;
  sidecars_ = sidecars;
}

bool ModelRunner::Repeats(const StepPlan& plan) const {
  const auto num_seqs = static_cast<int>(plan.sequences.size());
  return ops_->device() == Device::kCuda && plan.num_tokens == num_seqs &&
         plan.num_sample_rows == num_seqs && plan.num_score_rows == 0 && sparse_.rows.empty() &&
         votes_.empty();
}

ModelRunner::Result ModelRunner::Forward(const StepPlan& plan, bool is_greedy) {
  const int num_seqs = static_cast<int>(plan.sequences.size());
  GLOAM_CHECK(!kv_.empty());
  GLOAM_CHECK(num_seqs >= 1 && num_seqs <= limits_.max_num_seqs);
  GLOAM_CHECK(plan.num_tokens <= limits_.max_num_batched_tokens);
  GLOAM_CHECK(plan.num_score_rows <= limits_.max_score_rows);

  FillSparsity(plan);
  const bool repeats = Repeats(plan);
  StepShape shape = {.num_seqs = num_seqs,
                     .num_tokens = plan.num_tokens,
                     .num_logit_rows = plan.num_score_rows + plan.num_sample_rows};
  if (repeats) {
    const int padded = PaddedDecodeSeqs(num_seqs, limits_.max_num_seqs);
    shape = {.num_seqs = padded, .num_tokens = padded, .num_logit_rows = padded};
  }
  ops_->BeginStep();
  host_ = StepArrays::At(arrays_.host_data(), shape);
  FillArrays(plan, shape);
  ops_->Stage(arrays_, 0, host_.bytes);
  block_tables_.Stage(*ops_);

  const StepArrays device = StepArrays::At(arrays_.device_data(), shape);
  ForwardBatch batch;
  batch.seqs = {.num_seqs = shape.num_seqs,
                .num_tokens = shape.num_tokens,
                .max_blocks_per_seq = block_tables_.max_blocks_per_seq(),
                .positions = device.positions,
                .slot_mapping = device.slot_mapping,
                .cu_seqlens = device.cu_seqlens,
                .context_lens = device.context_lens,
                .block_tables = block_tables_.device(),
                .host_cu_seqlens = host_.cu_seqlens,
                .host_context_lens = host_.context_lens};
  batch.token_ids = device.token_ids;
  batch.logit_rows = device.logit_rows;
  batch.num_logit_rows = shape.num_logit_rows;
  batch.is_greedy = is_greedy && plan.num_score_rows == 0;
  batch.kv = kv_;
  batch.sidecars = sidecars_;
  batch.sparse_first_layers = sparse_first_layers_.tokens();
  batch.sparse = sparse_.tokens();
  batch.votes = votes_;
  batch.sparse_stats = sparse_stats_.data();
  const LogitRows logits = RunModel(batch, device.token_ids, repeats);
  for (const PromptVote& vote : votes_) vote.compressed->complete = true;

  Result result;
  result.sparsity = {.rows = sparse_.rows,
                     .stats = sparse_stats_.data(),
                     .num_layers = model_->config().num_layers,
                     .num_kv_heads = model_->config().num_kv_heads};
  if (shape.num_logit_rows == 0) return result;
  GLOAM_CHECK(logits.values.shape[0] == shape.num_logit_rows);
  result.score = logits.values.Rows(0, plan.num_score_rows);
  result.sample = logits.Rows(plan.num_score_rows, plan.num_sample_rows);
  return result;
}

LogitRows ModelRunner::RunModel(const ForwardBatch& batch, int32_t* token_ids, bool repeats) {
  const auto run = [&] {
    ops_->TakeDrawnTokens({.token_ids = token_ids, .num_tokens = batch.seqs.num_tokens});
    return model_->Forward(batch);
  };
  if (!repeats) return run();
  // A step that is repeated without the model leaves its logits where they were before.
  const uint64_t key = RepeatKey(batch.seqs.num_seqs, batch.is_greedy);
  LogitRows& logits = repeated_logits_[key];
  ops_->Repeat(key, [&] { logits = run(); });
  return logits;
}

void ModelRunner::FillArrays(const StepPlan& plan, const StepShape& shape) {
  int row = 0;
  int token = 0;
  int score_row = 0;
  int sample_row = plan.num_score_rows;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    host_.cu_seqlens[row] = token;
    host_.context_lens[row] = scheduled.sequence->num_computed + scheduled.num_tokens;
    FillTokens(scheduled, token);
    block_tables_.Fill(row, scheduled.sequence->table);
    for (int i = 0; i < scheduled.num_score_rows; ++i) {
      host_.logit_rows[score_row++] = token + scheduled.first_score_row + i;
    }
    token += scheduled.num_tokens;
    if (scheduled.samples) host_.logit_rows[sample_row++] = token - 1;
    ++row;
  }
  GLOAM_CHECK(token == plan.num_tokens);
  // Padding: sequences of one token that attend to nothing and leave nothing in the cache.
  for (; row < shape.num_seqs; ++row, ++token) {
    host_.cu_seqlens[row] = token;
    host_.context_lens[row] = 0;
    host_.token_ids[token] = 0;
    host_.positions[token] = 0;
    host_.slot_mapping[token] = -1;
    host_.logit_rows[row] = token;
  }
  host_.cu_seqlens[shape.num_seqs] = token;
}

void ModelRunner::FillSparsity(const StepPlan& plan) {
  sparse_.rows.clear();
  sparse_first_layers_.rows.clear();
  votes_.clear();
  int next_token = 0;
  for (size_t seq = 0; seq < plan.sequences.size(); ++seq) {
    const Sequence& sequence = *plan.sequences[seq].sequence;
    const int begin = sequence.num_computed;
    const int end = begin + plan.sequences[seq].num_tokens;
    const int first_token = next_token;
    next_token += plan.sequences[seq].num_tokens;
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
    host_.token_ids[first_token + i] = position < sequence.num_known()
                                           ? sequence.tokens[position]
                                           : DrawnToken(sequence.drawn_in_row);
    host_.positions[first_token + i] = position;
    host_.slot_mapping[first_token + i] = block * kBlockTokens + position % kBlockTokens;
  }
}

LogitRows ModelRunner::RunStep(Sequence& sequence, int num_tokens, bool is_greedy) {
  StepPlan plan;
  plan.num_tokens = num_tokens;
  plan.num_sample_rows = 1;
  plan.sequences.push_back({.sequence = &sequence, .num_tokens = num_tokens, .samples = true});
  return Forward(plan, is_greedy).sample;
}

bool ModelRunner::IsFinite(const TensorView& logits) {
  std::vector<float> row(logits.num_elements());
  ops_->Download(row.data(), logits.data, row.size() * sizeof(float));
  return std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); });
}

Status ModelRunner::WarmUp() {
  Sequence sequence;
  sequence.tokens.assign(
      std::min({kBlockTokens, limits_.max_num_batched_tokens, limits_.max_model_len}), 0);
  sequence.table.blocks = {0};
  const auto num_tokens = static_cast<int>(sequence.tokens.size());
  bool finite = IsFinite(RunStep(sequence, num_tokens, /*is_greedy=*/false).values);
  // What decoding needs is loaded, and the steps recorded, before a request waits for them.
  sequence.num_computed = num_tokens - 1;
  for (int i = 0; i < 2 && ops_->device() == Device::kCuda; ++i) {
    RunStep(sequence, 1, /*is_greedy=*/true);
    finite = IsFinite(RunStep(sequence, 1, /*is_greedy=*/false).values) && finite;
  }
  block_tables_.Forget(0);
  if (!finite) return Internal("the model's first forward pass gave logits that are not finite");
  return OkStatus();
}

}  // namespace gloam
