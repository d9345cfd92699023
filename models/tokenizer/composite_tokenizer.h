// CompositeTokenizer: the one Tokenizer of the program: finds added tokens, hands the text between
// them to a TextEncoder, and decodes from the token table.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/tokenizer/added_tokens.h"
#include "models/tokenizer/text_encoder.h"
#include "models/tokenizer/token_table.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

struct TokenizerParts {
  std::unique_ptr<const TokenTable> table;
  std::unique_ptr<const TextEncoder> encoder;  // may refer to `table`
  std::vector<AddedToken> added_tokens;
  std::vector<int32_t> prefix, suffix;  // what add_special puts around a prompt
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;  // as the files say; well-known names are added
  bool strips_leading_space = false;
};

std::unique_ptr<Tokenizer> MakeCompositeTokenizer(TokenizerParts parts);

}  // namespace gloam
