// ForCandidates: the walk of the estimators over the blocks with a candidate, batch by batch, and
// what they fetch ahead. On the thread that estimates.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/estimate/kernels.h"

namespace gloam::cpu {

// Blocks are computed in batches: a block is a chain of dependent steps (ranges, scales, weights,
// products), and the steps of several blocks fill each other's gaps.
constexpr int kBatchBlocks = 4;

// Candidates ahead whose blocks are fetched: their ids are random, nothing else foresees them.
constexpr int kPrefetchBlocks = 2 * kBatchBlocks;

// Walks over the blocks in which some head has a candidate.
class CandidateBlocks {
 public:
  CandidateBlocks(const EstimateCall& call, int64_t end)
      : masks_(call.masks),
        num_heads_(call.num_heads),
        num_blocks_(call.keys->num_blocks),
        next_(call.begin_block),
        end_(end) {}

  // The next one, or -1.
  int64_t Next() {
    for (; next_ < end_; ++next_) {
      if (HasCandidate(masks_, num_heads_, num_blocks_, next_)) return next_++;
    }
    return -1;
  }

 private:
  const TokenMask* masks_;
  const int num_heads_;
  const int64_t num_blocks_;
  int64_t next_;
  const int64_t end_;
};

// Calls compute(blocks, count, ahead) for batches of candidate blocks. compute() fetches the
// `count` blocks `ahead`, where they are not negative, a few lines at a time between other work:
// prefetches that come in a crowd hold everything else up. prefetch(i) fetches the first ones.
template <typename Prefetch, typename Compute>
void ForCandidates(const EstimateCall& call, const Prefetch& prefetch, const Compute& compute) {
  // The blocks behind the last one are likely this thread's next.
  CandidateBlocks blocks(call, call.end_block);
  CandidateBlocks later(call, std::min(call.end_block + kPrefetchBlocks, call.keys->num_blocks));
  for (int i = 0; i < kPrefetchBlocks; ++i) {
    const int64_t block = later.Next();
    if (block >= 0) prefetch(block);
  }
  int64_t batch[kBatchBlocks], ahead[kBatchBlocks];
  int count = 0;
  for (int64_t i = blocks.Next(); i >= 0; i = blocks.Next()) {
    ahead[count] = later.Next();
    batch[count++] = i;
    if (count == kBatchBlocks) {
      compute(batch, count, ahead);
      count = 0;
    }
  }
  if (count > 0) compute(batch, count, ahead);
}

}  // namespace gloam::cpu
