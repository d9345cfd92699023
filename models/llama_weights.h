// The weights of a Llama-family network in a backend's memory, loaded from a ModelFile.
// Owned by Llama; immutable after loading.
#pragma once

#include <memory>
#include <vector>

#include "base/status.h"
#include "kernels/ops.h"
#include "models/model.h"
#include "models/model_file.h"

namespace gloam {

// Matrices that share an input, stacked by rows: Q, K and V, or gate and up. Neighbours of one
// type are one Weight; files mix types (V often has more bits than Q and K).
struct StackedLinear {
  struct Part {
    std::unique_ptr<Weight> weight;  // [rows of its matrices, in_features]
    int64_t first_row = 0;           // in the stack
  };
  std::vector<Part> parts;  // at most GemmParams::kMaxOutputs
  Buffer bias;              // [out_features] fp32, or empty
  bool precise = false;     // see GemmParams::precise

  // y = x W^T + bias, or y += x W^T + bias; x is [m, in_features], y [m, out_features].
  void Apply(Ops& ops, const TensorView& x, const TensorView& y, bool accumulate) const;
  // Of gate and up: y = silu(x W_gate^T) * (x W_up^T), y [m, out_features / 2]. Returns false, with
  // nothing done, where Apply and SiluMul are to do it.
  [[nodiscard]] bool ApplyGated(Ops& ops, const TensorView& x, const TensorView& y) const;
};

struct LlamaLayer {
  Buffer attention_norm;        // [hidden_size]
  StackedLinear qkv;            // [(num_heads + 2 num_kv_heads) head_dim, hidden_size]
  Buffer q_norm, k_norm;        // [head_dim], or empty (Qwen3 has them)
  StackedLinear attention_out;  // [hidden_size, num_heads head_dim]
  Buffer feed_forward_norm;     // [hidden_size]
  StackedLinear gate_up;        // [2 intermediate_size, hidden_size]
  StackedLinear down;           // [hidden_size, intermediate_size]
};

struct LlamaWeights {
  std::unique_ptr<Weight> token_embedding;  // [vocab_size, hidden_size]
  std::vector<LlamaLayer> layers;
  Buffer output_norm;               // [hidden_size]
  std::unique_ptr<Weight> lm_head;  // [vocab_size, hidden_size], or null: the token embedding
  Buffer rope_cos, rope_sin;        // [max_position, rotary_dim / 2]
  int64_t bytes = 0;                // of all the above
};

// Errors: kInvalidArgument (a tensor of another shape, naming it, the expected and the found),
// kNotFound (a tensor missing), kUnimplemented (its type), kResourceExhausted.
[[nodiscard]] StatusOr<LlamaWeights> LoadLlamaWeights(const ModelFile& file, Ops& ops,
                                                      const LoadOptions& options);

}  // namespace gloam
