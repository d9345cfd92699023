// What the JSON files of a Hugging Face folder say about a model.
#pragma once

#include <filesystem>
#include <string>

#include "base/status.h"
#include "models/model_config.h"
#include "nlohmann/json.hpp"

namespace gloam {

// config.json: errors are kInvalidArgument and kUnimplemented, with `file` and the field.
[[nodiscard]] StatusOr<ModelConfig> ParseHfConfig(const nlohmann::json& json,
                                                  const std::string& file);

// generation_config.json where the folder has one, with config.json's end-of-text ids where that
// file names none.
[[nodiscard]] StatusOr<GenerationDefaults> ReadGenerationDefaults(
    const std::filesystem::path& folder, const nlohmann::json& config, int vocab_size);

// chat_template.jinja, or what tokenizer_config.json holds (a string, or a list of named ones of
// which "default" is taken); empty where there is neither.
[[nodiscard]] StatusOr<std::string> ReadChatTemplate(const std::filesystem::path& folder);

}  // namespace gloam
