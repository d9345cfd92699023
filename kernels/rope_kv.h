// Rotary position embedding of Q and K, and the append of K and V to the paged cache.
#pragma once

#include "kernels/paged_kv.h"
#include "kernels/tensor_view.h"

namespace gloam {

// How a head's channels are paired: NeoX pairs (i, i + rotary_dim/2), as Hugging Face stores them
// and Qwen's GGUF files do; interleaved pairs (2i, 2i + 1), as GGUF files of the Llama family do.
enum class RopeStyle : uint8_t { kNeox, kInterleaved };

// Rotates q into q_out, rotates k, and writes k and v to the cache at batch.slot_mapping. A token
// with slot -1 (padding of a recorded step) writes nothing to the cache.
struct RopeKvParams {
  SequenceBatch batch;
  TensorView q;      // [num_tokens, num_heads, head_dim]
  TensorView q_out;  // same shape, Ops::QueryDType; no data: q in place
  TensorView k;      // [num_tokens, num_kv_heads, head_dim]; the CPU rotates it in place
  TensorView v;      // [num_tokens, num_kv_heads, head_dim]
  // cos and sin of position * frequency, scaling included: [max_positions, rotary_dim / 2] each.
  const float* cos = nullptr;
  const float* sin = nullptr;
  int rotary_dim = 0;  // even, <= head_dim; channels past it are not rotated; 0: no rotation
  RopeStyle style = RopeStyle::kNeox;
  KvLayerView kv;
};

}  // namespace gloam
