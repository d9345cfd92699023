// The Hugging Face kind of ModelFile: a folder of config.json, safetensors (one file, or shards
// with an index) and tokenizer files.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "base/status.h"
#include "models/model_file.h"

namespace gloam {

// Errors as ModelFile::Open's.
[[nodiscard]] StatusOr<std::unique_ptr<ModelFile>> OpenHfModel(const std::filesystem::path& folder);

// GGUF's name of a tensor: "model.layers.0.self_attn.q_proj.weight" is "blk.0.attn_q.weight".
// Empty for tensors that need no loading (a stored table of rotary frequencies); a name that means
// nothing here stays as it is.
std::string GgufNameOf(const std::string& hf_name);

// By its extension: .bin, .pt, .pth or .pkl. Reading such a file may run code, so none is read.
bool IsPickleFile(const std::filesystem::path& path);

}  // namespace gloam
