// Scheduler: decides which sequences run how many tokens in the next step, and which blocks they
// hold. Pure bookkeeping: no model, no device, no clock. Owned by EngineCore; engine thread only.
//
// Running sequences go first, each with one token when it decodes or with a chunk of its prompt
// when it is in prefill. The decoding ones have their token reserved, so a long prompt never stops
// them, and a step with any may be shorter than others, so that none waits for long. What is left
// of the token budget admits waiting sequences. When blocks run out, the running sequence that is
// last in order gives up its blocks and waits again; it recomputes later.
//
// A step may be planned while the one before still runs on a device, and draws the last tokens of
// some sequences (Sequence::drawn_in_row); they must be known when the planned step is advanced.
// The device takes steps in order, so blocks that are given back may go to others at once.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/block_manager.h"
#include "engine/sequence.h"

namespace gloam {

struct SchedulerOptions {
  int max_num_seqs = 256;             // sequences in one step
  int max_num_batched_tokens = 2048;  // tokens in one step
  // The same where a sequence decodes, which waits so long for its next token; max_num_seqs at
  // least. 0: max_num_batched_tokens.
  int max_tokens_beside_decode = 0;
  int max_score_rows = 128;  // prompt tokens in one step that get log-probabilities
  int64_t num_blocks = 0;
  bool enable_prefix_caching = true;
};

struct ScheduledSequence {
  Sequence* sequence = nullptr;
  int num_tokens = 0;       // computes tokens [num_computed, num_computed + num_tokens)
  int first_score_row = 0;  // index, within those, of the first whose logits score the next token
  int num_score_rows = 0;
  bool samples = false;  // the last of them is the sequence's last: a token is drawn after it
};

struct StepPlan {
  std::vector<ScheduledSequence> sequences;
  int num_tokens = 0;
  int num_score_rows = 0;
  int num_sample_rows = 0;
  int num_preempted = 0;
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options);

  // Puts an idle sequence into the waiting queue. Its tokens must fit the whole cache.
  void Add(Sequence& sequence);

  // Takes a sequence out in any state; its blocks are free afterwards.
  void Remove(Sequence& sequence);

  // Plans one step; valid until the next call. No sequence may be removed before Advance().
  const StepPlan& Schedule();

  // After the planned step ran, or began to: its tokens are in the cache for the steps that follow,
  // and full blocks can be shared.
  void Advance();

  bool HasWork() const { return !waiting_.empty() || !running_.empty(); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int64_t num_preemptions() const { return num_preemptions_; }        // since the start
  int64_t num_prefix_queries() const { return num_prefix_queries_; }  // tokens, since the start
  int64_t num_prefix_hits() const { return num_prefix_hits_; }        // tokens, since the start
  const BlockManager& blocks() const { return blocks_; }

  // Errors: kInternal saying what is inconsistent.
  [[nodiscard]] Status CheckIntegrity() const;

 private:
  struct ByOrder {
    bool operator()(const Sequence* a, const Sequence* b) const { return a->order < b->order; }
  };

  void ScheduleRunning();
  void AdmitWaiting();
  // Tokens that `sequence` may compute now, at most `limit`, given that it starts at `start`.
  int ChunkLength(const Sequence& sequence, int start, int limit) const;
  void AddToPlan(Sequence& sequence, int num_tokens);
  void PreemptLast();
  int64_t BlocksReservedByRunning() const;

  SchedulerOptions options_;  // never changes
  BlockManager blocks_;
  std::set<Sequence*, ByOrder> waiting_;
  std::vector<Sequence*> running_;  // sorted by order
  StepPlan plan_;
  int token_budget_ = 0;  // of the step
  int64_t num_preemptions_ = 0;
  int64_t num_prefix_queries_ = 0;
  int64_t num_prefix_hits_ = 0;
};

}  // namespace gloam
