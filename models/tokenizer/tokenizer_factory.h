// Makers of tokenizers, one per source of vocabulary.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

// The tokenizer keys of a GGUF file ("tokenizer.ggml.*").
struct GgufVocabulary {
  std::string model;  // "gpt2" (byte-level BPE) or "llama" (SentencePiece)
  std::string pre;    // pre-tokeniser: "default", "gpt-2", "smollm", "llama-bpe", "qwen2"
  std::vector<std::string> tokens;
  std::vector<float> scores;   // SentencePiece; else empty
  std::vector<int32_t> types;  // 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
  std::vector<std::string> merges;  // BPE: "left right"; else empty
  int32_t bos_id = -1, eos_id = -1, eot_id = -1, unk_id = -1, pad_id = -1;
  bool add_bos = false, add_eos = false, add_space_prefix = true;
};

// Errors: kInvalidArgument naming the key at fault, kUnimplemented naming model or pre-tokeniser.
[[nodiscard]] StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(GgufVocabulary vocabulary);

// A Hugging Face folder: tokenizer.json where present (else tokenizer.model), with
// tokenizer_config.json. `eos_ids` are added to what those files say (generation_config.json).
[[nodiscard]] StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerFolder(
    const std::filesystem::path& folder, std::vector<int32_t> eos_ids);

}  // namespace gloam
