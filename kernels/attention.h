// Dense causal attention over the paged KV cache, for prefill chunks and decode rows in one batch.
// The query token at position p of a sequence attends to positions (p - sliding_window, p].
//
// Work is split along the context at fixed positions and merged in ascending order, so a row's
// result does not depend on its neighbours, on chunking, or on the number of threads.
#pragma once

#include "kernels/paged_kv.h"
#include "kernels/tensor_view.h"

namespace gloam {

// What Attention of one forward pass has in common over the layers.
struct AttentionPlanParams {
  SequenceBatch batch;
  KvLayout kv;
  int num_heads = 0;
  int sliding_window = 0;
};

struct AttentionParams {
  SequenceBatch batch;
  TensorView q;            // [num_tokens, num_heads, head_dim], after RoPE; Ops::QueryDType
  KvLayerView kv;          // holds this step's keys and values already
  float scale = 0;         // usually 1 / sqrt(head_dim)
  int sliding_window = 0;  // tokens that a query sees, itself included; 0: all
  TensorView out;          // [num_tokens, num_heads, head_dim]
  // [num_seqs] sequences to leave out, whose rows of `out` stay as they are; null: none.
  const bool* left_out = nullptr;
};

}  // namespace gloam
