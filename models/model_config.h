// What the numbers of a model are, whichever file they came from (GGUF metadata or config.json).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/rope_kv.h"

namespace gloam {

// Llama 3's rope scaling, linear scaling, or none. (GGUF may carry the factors per channel.)
struct RopeScaling {
  enum class Type : uint8_t { kNone, kLinear, kLlama3 };
  Type type = Type::kNone;
  float factor = 1.0f;
  float low_freq_factor = 1.0f;
  float high_freq_factor = 4.0f;
  int original_max_position = 8192;
  std::vector<float> freq_factors;  // [rotary_dim / 2] divisors of each frequency, or empty
};

struct ModelConfig {
  std::string architecture;  // "llama", "mistral", "qwen2", "qwen3", "smollm3"
  std::string name;          // as the file calls itself; may be empty
  int num_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_position = 0;  // context length that the model was trained for
  float rms_norm_eps = 1e-5f;
  float rope_theta = 10000.0f;
  int rotary_dim = 0;
  RopeStyle rope_style = RopeStyle::kNeox;
  RopeScaling rope_scaling;
  std::vector<bool> layer_uses_rope;  // empty: every layer (SmolLM3 leaves some without)
  int sliding_window = 0;             // 0: none
  bool qk_norm = false;               // Qwen3
  bool tie_embeddings = false;
  bool attention_bias = false;  // Qwen2: biases on Q, K, V
};

// The type of KV cache that keeps the model's answers close to the reference at two bytes an
// element: bf16, unless biases make the keys large. Those of Qwen2.5-Coder-0.5B reach 220, where
// bf16 rounds by up to 0.5: its mean distance from the reference is 0.034 with bf16 and 0.024 with
// fp16 (48 prompts, bench/fidelity, 2026-11-22).
inline DType DefaultKvDType(const ModelConfig& config) {
  return config.attention_bias ? DType::kF16 : DType::kBF16;
}

// Whether answers stay close with an fp8 (e4m3) cache too. Keys that biases make large do not: of
// Qwen2.5-Coder-1.5B's clear greedy choices a third change, and a token's loss rises by 0.12
// (cuda_fidelity_test, 2026-11-26).
inline bool SuitsFp8Kv(const ModelConfig& config) { return !config.attention_bias; }

// A model's generation_config.json: defaults for requests that do not say.
struct GenerationDefaults {
  std::optional<float> temperature, top_p, min_p, repetition_penalty;
  std::optional<int> top_k;
  std::vector<int32_t> eos_token_ids;  // any of them ends an answer
};

}  // namespace gloam
