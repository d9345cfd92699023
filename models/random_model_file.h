// RandomModelFile: a model of a known shape with random weights and no file, to measure speed.
// Matrices share one stretch of random bytes, mapped again and again, so that a model of any size
// costs 64 MiB; a backend that copies its weights has memory of its own for each.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "models/model_file.h"

namespace gloam {

class RandomModelFile final : public ModelFile {
 public:
  // `shape` is a name of ShapeNames(); matrices are of `type` (bf16, q4_0, q8_0). Errors:
  // kInvalidArgument naming what is known, kResourceExhausted.
  [[nodiscard]] static StatusOr<std::unique_ptr<ModelFile>> Create(std::string_view shape,
                                                                   std::string_view type);
  static std::vector<std::string_view> ShapeNames();

  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return generation_defaults_; }
  const std::string& chat_template() const override { return chat_template_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  // kUnimplemented: there are no words.
  StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer() const override;
  std::string path() const override { return config_.name; }

 private:
  // Reserved addresses; the mappings in them go away with it.
  struct Range {
    Range() = default;
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
    ~Range();
    std::byte* data = nullptr;
    size_t bytes = 0;
  };

  RandomModelFile() = default;
  [[nodiscard]] Status MapWeights(WeightType type, size_t bytes);
  void AddTensors(WeightType type);

  ModelConfig config_;
  GenerationDefaults generation_defaults_;
  std::string chat_template_;
  std::vector<TensorInfo> tensors_;
  Range weights_;
  std::vector<float> vectors_;  // ones, for every norm; biases too
};

}  // namespace gloam
