// Text files as tokens, for the subcommands that measure on real text.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

// The first `max_tokens` tokens of the files' texts, one after another, without special tokens.
// Errors: kNotFound naming the file.
[[nodiscard]] StatusOr<std::vector<int32_t>> TokenizeFiles(const std::vector<std::string>& files,
                                                           const Tokenizer& tokenizer,
                                                           size_t max_tokens);

}  // namespace gloam
