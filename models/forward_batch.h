// One step's input to a model: packed tokens of several sequences, some in prefill, some in decode.
// Built by engine/model_runner, read by Model::Forward.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/paged_kv.h"

namespace gloam {

struct ForwardBatch {
  SequenceBatch seqs;
  const int32_t* token_ids = nullptr;   // [num_tokens], device
  const int32_t* logit_rows = nullptr;  // [num_logit_rows] indices into the tokens, device
  int num_logit_rows = 0;               // may be 0: a prefill chunk that is not the last
  std::span<const KvLayerView> kv;      // [num_layers]
};

}  // namespace gloam
