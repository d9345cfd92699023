// ModelFile: a GGUF file or a Hugging Face folder, opened, checked and mapped. It gives the
// model's numbers and its tensors under one set of names (GGUF's: "blk.0.attn_q.weight"), so the
// forward pass does not know the format. Immutable; keeps the mapping alive; any thread.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/weight.h"
#include "models/model_config.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

struct TensorInfo {
  std::string name;            // GGUF's name
  std::vector<int64_t> shape;  // outermost first: a matrix is [rows, cols], a vector [n]
  RawWeight data;              // a vector of n elements is one row of n columns
};

class ModelFile {
 public:
  virtual ~ModelFile() = default;

  // Opens `path` by what it is: a .gguf file or a folder with config.json. Every count, offset and
  // size is checked against the file. Errors: one line with file, field and offset.
  [[nodiscard]] static StatusOr<std::unique_ptr<ModelFile>> Open(const std::filesystem::path& path);

  virtual const ModelConfig& config() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;
  virtual const std::string& chat_template() const = 0;  // empty where there is none
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  virtual StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer() const = 0;
  virtual std::string path() const = 0;

  // Errors: kNotFound naming the tensor and the file.
  [[nodiscard]] StatusOr<TensorInfo> Find(std::string_view name) const;
  bool Has(std::string_view name) const;
};

}  // namespace gloam
