// TinyModelFile: a small random model of any family, held in memory, and the whole forward pass
// over it in plain double-precision loops: the oracle of models/llama.cc. It shares no code with
// the product but DequantizeRow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "models/model_file.h"

namespace gloam {

class TinyModelFile final : public ModelFile {
 public:
  // Random weights of mixed types (V and `up` differ from their neighbours when `mixed_types`).
  TinyModelFile(const ModelConfig& config, bool mixed_types, uint64_t seed);

  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return generation_defaults_; }
  const std::string& chat_template() const override { return chat_template_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer() const override;
  std::string path() const override { return "tiny"; }

  std::vector<TensorInfo>& mutable_tensors() { return tensors_; }

 private:
  void AddMatrix(const std::string& name, WeightType type, int64_t rows, int64_t cols);
  void AddVector(const std::string& name, int64_t size, double mean, double deviation);
  void Add(const std::string& name, WeightType type, std::vector<int64_t> shape,
           std::vector<std::byte> data);

  ModelConfig config_;
  GenerationDefaults generation_defaults_;
  std::string chat_template_;
  std::vector<TensorInfo> tensors_;
  std::vector<std::vector<std::byte>> storage_;
  std::mt19937_64 random_;
};

// Logits of every position, [num_tokens][vocab_size].
std::vector<std::vector<double>> ReferenceLogits(const TinyModelFile& file,
                                                 std::span<const int32_t> tokens);

}  // namespace gloam
