#include "engine/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace gloam {
namespace {

// Blocks kept free, as a share of all, when a sequence joins others: room for those to grow, so
// that the newcomer is not pre-empted at once (vLLM's watermark).
constexpr int64_t kWatermarkDivisor = 100;

// The tokens of a chunk [start, start + num_tokens) whose logits score a prompt token not scored
// yet: position p scores token p + 1.
struct ScoreRange {
  int begin;
  int end;
};
ScoreRange ScoreRangeOf(const Sequence& sequence, int start, int num_tokens) {
  if (!sequence.needs_scores()) return {start, start};
  const int begin = std::max(start, sequence.num_scored - 1);
  const int end = std::min(start + num_tokens, sequence.num_prompt_tokens - 1);
  return {begin, std::max(begin, end)};
}

// The tokens to look up in the prefix cache, which leaves the last of them out.
std::span<const int32_t> ShareableTokens(const Sequence& sequence) {
  const auto size = static_cast<int64_t>(sequence.tokens.size());
  return std::span(sequence.tokens)
      .first(std::min<int64_t>(size, int64_t{sequence.num_shareable()} + 1));
}

// Shortens a chunk [start, start + num_tokens) so that it does not mix tokens before and after the
// first sparse one, and has all of a compressor's voting tokens or none. 0: it has to wait for more
// room in a step.
int CutForSparsity(const Sequence& sequence, int start, int num_tokens) {
  const int end = start + num_tokens;
  if (start < sequence.first_sparse_token && sequence.first_sparse_token < end) {
    return CutForSparsity(sequence, start, sequence.first_sparse_token - start);
  }
  if (sequence.compressed && end > sequence.vote_begin && end < sequence.num_dense_prompt_tokens) {
    return std::max(0, sequence.vote_begin - start);
  }
  return num_tokens;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options), blocks_(options.num_blocks, options.enable_prefix_caching) {
  GLOAM_CHECK(options.max_num_seqs >= 1 && options.max_num_batched_tokens >= 1);
  GLOAM_CHECK(options.max_score_rows >= 1 && options.num_blocks >= 1);
  if (options.max_tokens_beside_decode == 0) {
    options_.max_tokens_beside_decode = options.max_num_batched_tokens;
  }
  GLOAM_CHECK(options_.max_tokens_beside_decode <= options.max_num_batched_tokens);
  running_.reserve(options.max_num_seqs);
  plan_.sequences.reserve(options.max_num_seqs);
}

void Scheduler::Add(Sequence& sequence) {
  GLOAM_CHECK(sequence.state == SequenceState::kIdle && !sequence.tokens.empty());
  GLOAM_CHECK(BlocksFor(static_cast<int64_t>(sequence.tokens.size())) <= options_.num_blocks);
  sequence.state = SequenceState::kWaiting;
  GLOAM_CHECK(waiting_.insert(&sequence).second);
}

void Scheduler::Remove(Sequence& sequence) {
  switch (sequence.state) {
    case SequenceState::kIdle:
      return;
    case SequenceState::kWaiting:
      waiting_.erase(&sequence);
      break;
    case SequenceState::kRunning:
      running_.erase(std::find(running_.begin(), running_.end(), &sequence));
      blocks_.Release(sequence.table);
      break;
  }
  sequence.state = SequenceState::kIdle;
}

const StepPlan& Scheduler::Schedule() {
  plan_.sequences.clear();
  plan_.num_tokens = 0;
  plan_.num_score_rows = 0;
  plan_.num_sample_rows = 0;
  plan_.num_preempted = 0;
  ScheduleRunning();
  if (plan_.num_preempted == 0) AdmitWaiting();
  return plan_;
}

void Scheduler::ScheduleRunning() {
  const auto num_decoding = std::count_if(running_.begin(), running_.end(),
                                          [](const Sequence* s) { return s->num_pending() == 1; });
  token_budget_ =
      num_decoding > 0 ? options_.max_tokens_beside_decode : options_.max_num_batched_tokens;
  int prefill_budget = std::max(0, token_budget_ - static_cast<int>(num_decoding));

  // Pre-emption shortens running_ at its end, behind or at the sequence in hand.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    const bool decoding = sequence.num_pending() == 1;
    const int limit = decoding ? token_budget_ - plan_.num_tokens : prefill_budget;
    const int num_tokens = ChunkLength(sequence, sequence.num_computed, limit);
    if (num_tokens == 0) continue;
    while (sequence.state == SequenceState::kRunning &&
           !blocks_.Grow(sequence.table, sequence.num_computed + num_tokens)) {
      PreemptLast();
    }
    if (sequence.state != SequenceState::kRunning) break;  // it was the last itself
    AddToPlan(sequence, num_tokens);
    if (!decoding) prefill_budget -= num_tokens;
  }
}

void Scheduler::AdmitWaiting() {
  int64_t num_reserved = BlocksReservedByRunning();
  while (!waiting_.empty() && num_running() < options_.max_num_seqs) {
    Sequence& sequence = **waiting_.begin();
    GLOAM_CHECK(sequence.drawn_in_row < 0);
    static const BlockManager::PrefixMatch kNoMatch;
    const BlockManager::PrefixMatch& match =
        sequence.needs_scores() ? kNoMatch : blocks_.FindPrefix(ShareableTokens(sequence));
    const int num_tokens =
        ChunkLength(sequence, match.num_tokens(), token_budget_ - plan_.num_tokens);
    if (num_tokens == 0) return;

    // All of its tokens must find room, not only this step's: a sequence that is admitted too
    // early only takes blocks from others and is pre-empted.
    const int64_t num_needed = BlocksFor(static_cast<int64_t>(sequence.tokens.size())) -
                               static_cast<int64_t>(match.blocks.size());
    const int64_t watermark = running_.empty() ? 0 : options_.num_blocks / kWatermarkDivisor;
    if (num_needed > blocks_.num_free() - match.num_unreferenced - num_reserved - watermark) return;

    if (sequence.num_cached_tokens < 0) {
      sequence.num_cached_tokens = match.num_tokens();
      num_prefix_queries_ += static_cast<int64_t>(sequence.tokens.size());
      num_prefix_hits_ += match.num_tokens();
    }
    waiting_.erase(waiting_.begin());
    blocks_.Attach(match, sequence.table);
    sequence.num_computed = match.num_tokens();
    GLOAM_CHECK(blocks_.Grow(sequence.table, sequence.num_computed + num_tokens));
    sequence.state = SequenceState::kRunning;
    running_.insert(std::upper_bound(running_.begin(), running_.end(), &sequence, ByOrder()),
                    &sequence);
    num_reserved += BlocksFor(static_cast<int64_t>(sequence.tokens.size())) -
                    static_cast<int64_t>(sequence.table.blocks.size());
    AddToPlan(sequence, num_tokens);
  }
}

int Scheduler::ChunkLength(const Sequence& sequence, int start, int limit) const {
  const int num_tokens = CutForSparsity(
      sequence, start, std::min(static_cast<int>(sequence.tokens.size()) - start, limit));
  const ScoreRange range = ScoreRangeOf(sequence, start, num_tokens);
  const int max_score_rows = options_.max_score_rows - plan_.num_score_rows;
  if (range.end - range.begin <= max_score_rows) return num_tokens;
  return range.begin - start + max_score_rows;
}

void Scheduler::AddToPlan(Sequence& sequence, int num_tokens) {
  const int start = sequence.num_computed;
  const ScoreRange range = ScoreRangeOf(sequence, start, num_tokens);
  const bool samples = num_tokens == sequence.num_pending();
  plan_.sequences.push_back({.sequence = &sequence,
                             .num_tokens = num_tokens,
                             .first_score_row = range.begin - start,
                             .num_score_rows = range.end - range.begin,
                             .samples = samples});
  plan_.num_tokens += num_tokens;
  plan_.num_score_rows += range.end - range.begin;
  plan_.num_sample_rows += samples ? 1 : 0;
}

void Scheduler::PreemptLast() {
  Sequence& victim = *running_.back();
  running_.pop_back();
  blocks_.Release(victim.table);
  victim.num_computed = 0;
  victim.state = SequenceState::kWaiting;
  waiting_.insert(&victim);  // its order puts it before everyone who came later
  ++plan_.num_preempted;
  ++num_preemptions_;
}

int64_t Scheduler::BlocksReservedByRunning() const {
  int64_t num_reserved = 0;
  for (const Sequence* sequence : running_) {
    num_reserved += BlocksFor(static_cast<int64_t>(sequence->tokens.size())) -
                    static_cast<int64_t>(sequence->table.blocks.size());
  }
  return num_reserved;
}

void Scheduler::Advance() {
  for (const ScheduledSequence& scheduled : plan_.sequences) {
    Sequence& sequence = *scheduled.sequence;
    GLOAM_CHECK(sequence.drawn_in_row < 0);
    sequence.num_computed += scheduled.num_tokens;
    sequence.num_scored += scheduled.num_score_rows;
    blocks_.CommitFullBlocks(sequence.table, sequence.tokens,
                             std::min(sequence.num_computed, sequence.first_sparse_token));
  }
}

Status Scheduler::CheckIntegrity() const {
  std::vector<const BlockTable*> tables;
  for (const Sequence* sequence : running_) {
    if (sequence->state != SequenceState::kRunning) return Internal("a running sequence is not");
    if (sequence->num_computed > static_cast<int>(sequence->tokens.size())) {
      return Internal("{} of {} tokens are computed", sequence->num_computed,
                      sequence->tokens.size());
    }
    if (static_cast<int>(sequence->table.blocks.size()) < BlocksFor(sequence->num_computed)) {
      return Internal("{} tokens lie in {} blocks", sequence->num_computed,
                      sequence->table.blocks.size());
    }
    tables.push_back(&sequence->table);
  }
  for (const Sequence* sequence : waiting_) {
    if (sequence->state != SequenceState::kWaiting) return Internal("a waiting sequence is not");
    if (!sequence->table.blocks.empty() || sequence->num_computed != 0) {
      return Internal("a waiting sequence holds {} blocks", sequence->table.blocks.size());
    }
  }
  if (num_running() > options_.max_num_seqs) return Internal("{} sequences run", num_running());
  if (!std::is_sorted(running_.begin(), running_.end(), ByOrder())) {
    return Internal("the running sequences are out of order");
  }
  return blocks_.CheckIntegrity(tables);
}

}  // namespace gloam
