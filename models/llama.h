// Llama: the forward pass of the Llama family (Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and 3,
// TinyLlama): pre-norm transformer, grouped-query attention with rotary positions over the paged
// cache, SwiGLU. What differs between families is in ModelConfig. Engine thread only.
#pragma once

#include <memory>

#include "models/llama_weights.h"
#include "models/model.h"

namespace gloam {

class Llama final : public Model {
 public:
  // Loads `file`'s weights into the memory of `ops`, which must outlive the model. `file` may go
  // away afterwards. Errors: LoadLlamaWeights.
  [[nodiscard]] static StatusOr<std::unique_ptr<Model>> Load(const ModelFile& file, Ops& ops,
                                                             const LoadOptions& options);

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return weights_.bytes; }
  [[nodiscard]] Status Reserve(int max_tokens, int max_logit_rows) override;
  LogitRows Forward(const ForwardBatch& batch) override;

 private:
  // Everything that a step computes, one after another in one piece of memory: what a small step
  // touches lies close together. max_rows is the larger of num_tokens and num_logit_rows.
  struct Activations {
    TensorView hidden;           // [num_tokens, hidden_size], the residual stream
    TensorView normed;           // [max_rows, hidden_size]
    TensorView qkv;              // [num_tokens, (num_heads + 2 num_kv_heads) head_dim]
    TensorView query;            // [num_tokens, num_heads head_dim] rotated; empty: qkv holds it
    TensorView attended;         // [num_tokens, num_heads head_dim]
    TensorView gate_up;          // [max_rows, 2 intermediate_size]
    TensorView last;             // [num_logit_rows, hidden_size], rows of `hidden`
    TensorView last_attended;    // [num_logit_rows, num_heads head_dim], rows of `attended`
    TensorView logits;           // [num_logit_rows, vocab_size] fp32
    size_t bytes_per_layer = 0;  // of the first ones, which every layer uses
    size_t bytes = 0;            // of all
  };

  Llama(ModelConfig config, LlamaWeights weights, Ops& ops);

  // `memory` may be null: then only the sizes count.
  Activations ActivationsAt(void* memory, int num_tokens, int num_logit_rows) const;
  void Attention(int layer_index, const ForwardBatch& batch);
  void Attend(int layer_index, const ForwardBatch& batch, const TensorView& q,
              const TensorView& out);
  void AfterAttention(const LlamaLayer& layer, const TensorView& attended,
                      const TensorView& hidden);
  LogitRows Logits(const TensorView& hidden, bool is_greedy);
  void RmsNorm(const TensorView& x, const Buffer& weight, const TensorView& out);

  ModelConfig config_;
  LlamaWeights weights_;
  Ops& ops_;
  Buffer memory_;  // of activations
  int max_tokens_ = 0;
  int max_logit_rows_ = 0;
  Activations activations_;  // of the step at hand
};

}  // namespace gloam
