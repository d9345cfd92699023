// tokenizer.json of Hugging Face's `tokenizers`: BPE models, byte-level or over characters.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "models/checked_json.h"
#include "models/tokenizer/composite_tokenizer.h"

namespace gloam {

// A row of "added_tokens", there or in tokenizer_config.json.
struct HfAddedToken {
  AddedToken token;
  bool normalized = false;  // looked for in the normalised text
};

// Errors: kInvalidArgument naming the field.
[[nodiscard]] Status ReadHfAddedToken(const JsonFields& fields, HfAddedToken* added);

// All but the ids of BOS and EOS, which tokenizer_config.json names. `more_tokens` are added where
// the file does not have their ids. Errors: kInvalidArgument naming the field, kUnimplemented
// naming the field and what it asks for.
[[nodiscard]] StatusOr<TokenizerParts> ReadTokenizerJson(
    const nlohmann::json& document, const std::string& file,
    const std::vector<HfAddedToken>& more_tokens);

}  // namespace gloam
