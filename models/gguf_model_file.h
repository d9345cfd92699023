// The GGUF kind of ModelFile: one mapped file with metadata, tokenizer and tensors.
#pragma once

#include <filesystem>
#include <memory>
#include <span>

#include "base/status.h"
#include "models/gguf.h"
#include "models/model_file.h"
#include "models/tokenizer/tokenizer_factory.h"

namespace gloam {

// Errors as ModelFile::Open's.
[[nodiscard]] StatusOr<std::unique_ptr<ModelFile>> OpenGgufModel(const std::filesystem::path& path);

// The same over bytes that outlive the result; `file` names them in errors.
[[nodiscard]] StatusOr<std::unique_ptr<ModelFile>> ParseGgufModel(std::span<const std::byte> bytes,
                                                                  std::string file);

// The model's numbers from its metadata and tensor table. Errors: kInvalidArgument and
// kUnimplemented naming the key.
[[nodiscard]] StatusOr<ModelConfig> ReadGgufConfig(const Gguf& gguf);

// The "tokenizer.ggml.*" keys. Errors: kInvalidArgument naming the key.
[[nodiscard]] StatusOr<GgufVocabulary> ReadGgufVocabulary(const Gguf& gguf);

}  // namespace gloam
