// Sequence: one answer as the scheduler sees it: tokens, how many of them are in the KV cache, and
// in which blocks. Owned by Answer (engine/answer.h); engine thread only.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "engine/block_manager.h"
#include "kernels/sparse_attention.h"

namespace gloam {

class Answer;

// Who goes first: lower priority, then earlier arrival, then lower index within a request.
struct SequenceOrder {
  int priority = 0;
  uint64_t arrival = 0;
  int index = 0;
  friend auto operator<=>(const SequenceOrder&, const SequenceOrder&) = default;
};

enum class SequenceState : uint8_t {
  kIdle,     // not with the scheduler: held back, or ended
  kWaiting,  // for a place in the batch; holds no blocks
  kRunning,
};

struct Sequence {
  SequenceOrder order;
  Answer* answer = nullptr;     // whose sequence this is; the scheduler does not look at it
  std::vector<int32_t> tokens;  // the prompt, then what was generated
  int num_prompt_tokens = 0;
  // Not below 0: the last of `tokens` is being drawn, in this row of the last Sample, and the host
  // does not know it yet. So it is while the next step is planned and begins to run.
  int drawn_in_row = -1;

  // Tokens from `first_sparse_token` on are computed under `policy`, never together with earlier
  // ones in one step; their blocks are not shared, because their contents depend on the policy.
  const SparsityPolicy* policy = nullptr;
  int first_sparse_token = std::numeric_limits<int>::max();
  int num_dense_prompt_tokens = 0;  // with a policy: the prompt, less what is decoded of it
  // With a compressor that has something to drop: tokens [vote_begin, num_dense_prompt_tokens) vote
  // and are computed in one step.
  std::unique_ptr<CompressedPrompt> compressed;
  int vote_begin = 0;

  // Changed by Scheduler alone.
  SequenceState state = SequenceState::kIdle;
  int num_computed = 0;        // leading tokens whose keys and values are in the cache
  int num_cached_tokens = -1;  // found in the prefix cache when it first ran; -1: has not run
  BlockTable table;

  // Log-probabilities of the prompt: how many of its tokens have theirs. The first needs none.
  bool wants_prompt_scores = false;
  int num_scored = 1;

  int num_known() const { return static_cast<int>(tokens.size()) - (drawn_in_row >= 0 ? 1 : 0); }
  int num_pending() const { return static_cast<int>(tokens.size()) - num_computed; }
  // Leading tokens whose keys and values do not depend on the policy and may come from the cache.
  int num_shareable() const {
    return compressed ? std::min(vote_begin, first_sparse_token) : first_sparse_token;
  }
  bool needs_scores() const { return wants_prompt_scores && num_scored < num_prompt_tokens; }
};

}  // namespace gloam
