#include "eval/paged_forced_decoder.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace gloam {
namespace {

constexpr int kChunk = 512;      // tokens of a prefill step
constexpr int kDenseChunk = 32;  // tokens of the dense row that are scored at a time

int RoundUpToBlocks(int num_tokens) { return BlocksFor(num_tokens) * kBlockTokens; }

}  // namespace

StatusOr<std::unique_ptr<PagedForcedDecoder>> PagedForcedDecoder::Create(
    const ForcedDecoderLimits& limits, Ops& ops, Model& model) {
  const int max_len = limits.max_context + limits.max_decoded;
  if (max_len > model.config().max_position) {
    return InvalidArgument("{} tokens of context and {} decoded are more than the model's {}",
                           limits.max_context, limits.max_decoded, model.config().max_position);
  }
  // A row's own blocks: the tokens fed, and where it compresses, what is prefilled anew.
  const int window_blocks = BlocksFor(limits.max_window) + 1;
  EngineOptions options;
  options.num_kv_blocks = BlocksFor(limits.max_context) +
                          int64_t{limits.max_rows} * BlocksFor(limits.max_decoded) +
                          int64_t{limits.max_compressed_rows} * window_blocks;
  options.kv_cache_dtype = limits.kv_dtype;
  options.sidecars = limits.sidecars;
  options.max_model_len = RoundUpToBlocks(max_len);
  // Rows share blocks, so there may be fewer than one request of full length would need alone.
  options.max_model_len = std::min<int>({options.max_model_len, model.config().max_position,
                                         static_cast<int>(options.num_kv_blocks) * kBlockTokens});
  GLOAM_ASSIGN_OR_RETURN(const KvPlan plan, PlanKvCache(options, model.config()));
  GLOAM_ASSIGN_OR_RETURN(KvCachePool pool,
                         KvCachePool::Create(ops, plan, model.config().num_layers));
  const int dense_chunk = ops.device() == Device::kCpu ? kDenseChunk : 1;
  const ModelRunnerLimits runner_limits = {
      .max_num_seqs = limits.max_rows,
      .max_num_batched_tokens = std::max({kChunk, limits.max_rows, window_blocks * kBlockTokens}),
      .max_score_rows = dense_chunk,
      .max_model_len = RoundUpToBlocks(max_len)};
  GLOAM_ASSIGN_OR_RETURN(ModelRunner runner, ModelRunner::Create(runner_limits, ops, model));
  runner.SetCache(pool.layers(), pool.sidecars());
  return std::unique_ptr<PagedForcedDecoder>(
      new PagedForcedDecoder(limits, model, std::move(pool), std::move(runner),
                             static_cast<int>(plan.num_blocks), dense_chunk));
}

PagedForcedDecoder::PagedForcedDecoder(const ForcedDecoderLimits& limits, Model& model,
                                       KvCachePool pool, ModelRunner runner, int num_blocks,
                                       int dense_chunk)
    : limits_(limits),
      model_(model),
      pool_(std::move(pool)),
      runner_(std::move(runner)),
      num_blocks_(num_blocks),
      dense_chunk_(dense_chunk) {}

void PagedForcedDecoder::GrowTable(Sequence& sequence, int num_tokens) {
  while (static_cast<int>(sequence.table.blocks.size()) < BlocksFor(num_tokens)) {
    GLOAM_CHECK(num_taken_ < num_blocks_);
    sequence.table.blocks.push_back(num_taken_++);
  }
}

void PagedForcedDecoder::Prefill(Sequence& sequence, int end) {
  GrowTable(sequence, end);
  while (sequence.num_computed < end) {
    // The tokens that a compressor asks come in one step.
    const int rest = end - sequence.num_computed;
    const int num_tokens = sequence.compressed ? rest : std::min(kChunk, rest);
    StepPlan plan;
    plan.num_tokens = num_tokens;
    plan.sequences.push_back({.sequence = &sequence, .num_tokens = num_tokens});
    runner_.Forward(plan);
    sequence.num_computed += num_tokens;
  }
}

Status PagedForcedDecoder::Start(std::span<const int32_t> context, std::span<const int32_t> tokens,
                                 RowPolicies policies) {
  GLOAM_CHECK(!policies.empty() && policies.front() == nullptr);
  const auto num_context = static_cast<int>(context.size());
  if (num_context == 0 || num_context % kBlockTokens != 0 || num_context > limits_.max_context) {
    return InvalidArgument("a context of {} tokens is not a multiple of {} up to {}", num_context,
                           kBlockTokens, limits_.max_context);
  }
  if (static_cast<int>(policies.size()) > limits_.max_rows) {
    return ResourceExhausted("{} policies at a time, but there is room for {}", policies.size(),
                             limits_.max_rows);
  }
  rows_.clear();
  num_taken_ = 0;
  tokens_ = tokens;
  num_fed_ = 0;
  Sequence shared;
  shared.tokens.assign(context.begin(), context.end());
  shared.table.version = ++last_version_;
  Prefill(shared, num_context);

  for (const auto& policy : policies) {
    Sequence row;
    row.tokens = shared.tokens;
    row.num_prompt_tokens = num_context;
    SetUpSparsity({.sparsity = policy}, model_.config(), row);
    const int num_shared =
        row.compressed ? row.vote_begin / kBlockTokens * kBlockTokens : num_context;
    if (num_context - num_shared > RoundUpToBlocks(limits_.max_window) + kBlockTokens) {
      return ResourceExhausted("a compressor's window of {} tokens, but there is room for {}",
                               num_context - row.vote_begin, limits_.max_window);
    }
    row.table.blocks.assign(shared.table.blocks.begin(),
                            shared.table.blocks.begin() + num_shared / kBlockTokens);
    row.table.version = ++last_version_;
    row.num_computed = num_shared;
    Prefill(row, num_context);
    rows_.push_back(std::move(row));
  }
  return OkStatus();
}

void PagedForcedDecoder::ScoreDense() {
  Sequence& row = rows_.front();
  const auto next = tokens_.subspan(num_fed_);
  const int num_tokens = std::min(dense_chunk_, static_cast<int>(next.size()));
  row.tokens.insert(row.tokens.end(), next.begin(), next.begin() + num_tokens);
  GrowTable(row, static_cast<int>(row.tokens.size()));
  StepPlan plan;
  plan.sequences.push_back(
      {.sequence = &row, .num_tokens = num_tokens, .num_score_rows = num_tokens});
  plan.num_tokens = plan.num_score_rows = num_tokens;
  const TensorView logits = runner_.Forward(plan).score;
  row.num_computed += num_tokens;
  dense_logits_.clear();
  for (int i = 0; i < num_tokens; ++i) {
    const auto* of_token = logits.Rows(i, 1).Data<const float>();
    dense_logits_.insert(dense_logits_.end(), of_token, of_token + logits.shape[1]);
  }
}

ForcedDecoder::Step PagedForcedDecoder::Next() {
  GLOAM_CHECK(num_fed_ < tokens_.size());
  const size_t in_chunk = num_fed_ % static_cast<size_t>(dense_chunk_);
  if (in_chunk == 0) ScoreDense();
  const auto vocab_size = static_cast<size_t>(model_.config().vocab_size);
  Step step;
  step.logits.emplace_back(dense_logits_.data() + in_chunk * vocab_size, vocab_size);
  const int32_t token = tokens_[num_fed_++];
  if (rows_.size() == 1) return step;

  StepPlan plan;
  for (Sequence& row : std::span(rows_).subspan(1)) {
    row.tokens.push_back(token);
    GrowTable(row, static_cast<int>(row.tokens.size()));
    plan.sequences.push_back({.sequence = &row, .num_tokens = 1, .samples = true});
  }
  plan.num_tokens = plan.num_sample_rows = static_cast<int>(rows_.size()) - 1;
  const ModelRunner::Result result = runner_.Forward(plan);
  for (Sequence& row : std::span(rows_).subspan(1)) ++row.num_computed;
  for (int i = 0; i < plan.num_sample_rows; ++i) {
    step.logits.emplace_back(result.sample.values.Rows(i, 1).Data<const float>(), vocab_size);
  }
  step.sparsity = result.sparsity;
  return step;
}

}  // namespace gloam
