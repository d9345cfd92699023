// How a token is shown beside its log-probability. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace gloam {

// The token's bytes as text; bytes that are no whole characters as OpenAI shows them: "\xe2\x98".
std::string TokenText(std::string_view bytes);

// The same for completions, whose top_logprobs are keyed by it: "bytes:\xe2\x98".
std::string CompletionTokenText(std::string_view bytes);

// Characters of a text, or of a piece of one.
int64_t CountCharacters(std::string_view utf8);

}  // namespace gloam
