// Sparse decode attention over the paged KV cache: select, estimate, prune, attend, by a policy per
// row. A row is one token of the step; its context are the tokens up to itself. Full blocks are
// judged, the open block (the last, of 1 to 16 tokens) is always attended.
//
// A row's result depends on its own context alone: not on neighbours in the batch, on how a
// sequence's tokens are split into steps, or on the number of threads. With every token kept it is
// the result of dense attention, bit for bit.
#pragma once

#include <atomic>
#include <span>
#include <vector>

#include "kernels/paged_kv.h"
#include "kernels/sidecars.h"
#include "kernels/sparsity_policy.h"
#include "kernels/token_set.h"

namespace gloam {

// The prompt tokens of one sequence that a compressor has kept: per layer and KV head a set of
// tokens [num_layers][num_kv_heads][num_blocks]. Tokens past it are all kept.
struct CompressedPrompt {
  int64_t num_blocks = 0;
  int num_kv_heads = 0;
  std::vector<TokenMask> masks;
  bool complete = false;  // every layer has voted

  TokenMask* Head(int layer, int kv_head) {
    return masks.data() + (int64_t{layer} * num_kv_heads + kv_head) * num_blocks;
  }
};

struct SparseRow {
  int token = 0;  // row of q and out
  int seq = 0;    // of the batch
  const SparsityPolicy* policy = nullptr;
  CompressedPrompt* compressed = nullptr;  // null without a compressor
  bool measure_true_mass = false;          // costs exact logits of the whole context
};

// What one row did in one layer for one KV head.
struct SparseHeadStats {
  int context = 0;       // tokens
  float candidates = 0;  // mean over the group's query heads, open block included
  float kept = 0;        // the same: what the paper calls the budget
  int loaded = 0;        // tokens whose keys and values were read: the union of the group
  float true_mass = -1;  // share of the full softmax mass that was kept, mean of the group
};

// Where the time of sparse attention goes, in nanoseconds summed over rows, KV heads and threads.
struct SparseStageTimes {
  std::atomic<int64_t> select = 0, estimate = 0, prune = 0, attend = 0, tail = 0;
};

struct SparseAttentionParams {
  SequenceBatch batch;
  TensorView q;  // [num_tokens, num_heads, head_dim], after RoPE
  KvLayerView kv;
  SidecarLayerView sidecars;
  float scale = 0;
  int layer = 0;
  std::span<const SparseRow> rows;
  SparseHeadStats* stats = nullptr;   // [rows.size()][num_kv_heads] out
  TensorView out;                     // [num_tokens, num_heads, head_dim]; only `rows` are written
  SparseStageTimes* times = nullptr;  // added to, for benches; null: nothing is timed
};

// SnapKV: the last `window_size` tokens of a sequence's prompt vote for the tokens before them;
// fills compressed->Head(layer, *). All tokens of the window are in this step.
struct CompressPromptParams {
  SequenceBatch batch;
  int seq = 0;
  int first_window_token = 0;  // in the batch
  CompressorConfig config;
  TensorView q;
  KvLayerView kv;
  float scale = 0;
  int layer = 0;
  CompressedPrompt* compressed = nullptr;
};

}  // namespace gloam
