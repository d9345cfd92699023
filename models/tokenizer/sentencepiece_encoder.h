// Encoders over the SentencePiece library, from tokenizer.model or from a GGUF vocabulary, for
// which an equal model is built in memory.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "models/tokenizer/bpe_encoder.h"
#include "models/tokenizer/sentencepiece_model.h"
#include "models/tokenizer/text_encoder.h"
#include "models/tokenizer/token_table.h"

namespace gloam {

// From a GGUF vocabulary. Every piece of text gets the dummy prefix where `add_space_prefix`.
// Errors: kInvalidArgument with the library's message.
[[nodiscard]] StatusOr<std::unique_ptr<TextEncoder>> MakeSentencePieceEncoder(
    const TokenTable& table, const std::vector<float>& scores, bool add_space_prefix);

// From a serialized ModelProto. `prefix_rule` says which pieces of text get the dummy prefix, in
// models that have one. Errors: kInvalidArgument with the library's message.
[[nodiscard]] StatusOr<std::unique_ptr<TextEncoder>> MakeSentencePieceEncoder(
    std::string_view proto, PrefixRule prefix_rule);

}  // namespace gloam
