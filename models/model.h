// Model: a loaded network that turns a batch of tokens into logits. The engine sees only this;
// models/llama.cc is the one real implementation, tests bring a fake.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "kernels/ops.h"
#include "models/forward_batch.h"
#include "models/model_config.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelConfig& config() const = 0;
  virtual int64_t weight_bytes() const = 0;

  // Makes room for steps of at most `max_tokens` tokens and `max_logit_rows` rows of logits; no
  // allocation happens in Forward after it. Errors: kResourceExhausted with the size.
  [[nodiscard]] virtual Status Reserve(int max_tokens, int max_logit_rows) = 0;

  // One forward pass: appends K and V of every token to the cache and returns the logits of
  // batch.logit_rows, valid until the next call; those of a greedy batch may be candidates.
  // Engine thread only.
  virtual LogitRows Forward(const ForwardBatch& batch) = 0;
};

// Everything that a model file or folder holds.
struct LoadedModel {
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;
  GenerationDefaults generation_defaults;
  std::string chat_template;  // Jinja source; empty where the model has none
};

struct LoadOptions {
  // Called from the loading thread as weights are read.
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
};

// Loads a GGUF file or a Hugging Face folder (config.json, safetensors, tokenizer) into `ops`'
// memory. `ops` must outlive the model. Errors are one line with the file, and the field or the
// offset at fault: kInvalidArgument (bad file), kUnimplemented (architecture, tensor type),
// kNotFound, kResourceExhausted.
[[nodiscard]] StatusOr<LoadedModel> LoadModel(const std::filesystem::path& path, Ops& ops,
                                              const LoadOptions& options);

}  // namespace gloam
