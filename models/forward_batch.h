// One step's input to a model: packed tokens of several sequences, some in prefill, some in decode.
// Built by engine/model_runner, read by Model::Forward.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/paged_kv.h"
#include "kernels/sidecars.h"
#include "kernels/sparse_attention.h"

namespace gloam {

// The tokens that attend sparsely in a layer.
struct SparseTokens {
  std::span<const SparseRow> rows;
  const bool* seqs = nullptr;  // [num_seqs] the sequences of `rows`, of which every token is a row
};

// A sequence whose prompt is compressed in this step: the window of voting tokens is part of it.
struct PromptVote {
  int seq = 0;
  int first_window_token = 0;  // in the batch
  const CompressorConfig* config = nullptr;
  CompressedPrompt* compressed = nullptr;
};

struct ForwardBatch {
  SequenceBatch seqs;
  const int32_t* token_ids = nullptr;   // [num_tokens], device
  const int32_t* logit_rows = nullptr;  // [num_logit_rows] indices into the tokens, device
  int num_logit_rows = 0;               // may be 0: a prefill chunk that is not the last
  bool is_greedy = false;               // the largest logits are all that is asked for
  std::span<const KvLayerView> kv;      // [num_layers]

  std::span<const SidecarLayerView> sidecars;  // [num_layers], or empty: none are kept
  SparseTokens sparse_first_layers;            // in layers below kDenseLayers
  SparseTokens sparse;                         // in the others
  std::span<const PromptVote> votes;
  // Out: [num_layers][sparse.rows.size()][num_kv_heads], by the rows of the layer.
  SparseHeadStats* sparse_stats = nullptr;
};

}  // namespace gloam
