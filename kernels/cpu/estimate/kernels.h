// The inner loops of estimators, in the best instruction set of the host (Highway's run-time
// dispatch): one decode row and KV head, on the calling thread. Arguments are checked by
// estimate.cc.
#pragma once

#include <cstdint>

#include "kernels/selector.h"

namespace gloam::cpu {

// Whether some head has a candidate in `block`; masks: [num_heads][num_blocks].
inline bool HasCandidate(const TokenMask* masks, int num_heads, int64_t num_blocks, int64_t block) {
  for (int head = 0; head < num_heads; ++head) {
    if (masks[head * num_blocks + block] != kNoTokens) return true;
  }
  return false;
}

// What a mirror of the keys looks like.
struct Mirror {
  SidecarKind kind = SidecarKind::kBlockQuant;
  int bits = 0;      // 2, 4 or 8
  int num_rows = 0;  // of quant_rows.h
};

// Logits of every token of every block in which some head has a candidate.
struct EstimateCall {
  const KeyBlocks* keys = nullptr;
  const float* queries = nullptr;  // [num_heads][channels]
  int num_heads = 0;
  int channels = 0;  // a multiple of 16; queries are zero where the mirror has no channel
  const TokenMask* masks = nullptr;  // [num_heads][num_blocks]
  float* logits = nullptr;           // [num_heads][16 * num_blocks]
  int64_t begin_block = 0;           // of the blocks in question
  int64_t end_block = 0;
};

// By the mirror's kind: kBlockQuant, or quants per token.
void EstimateFromBlockQuants(const EstimateCall& call, const Mirror& mirror);
void EstimateFromTokenQuants(const EstimateCall& call, const Mirror& mirror);
void EstimateFromKeys(const EstimateCall& call);

}  // namespace gloam::cpu
