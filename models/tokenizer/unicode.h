// Unicode facts that tokenizers need: classes of characters and normalisation form C (utf8proc).
// Pure functions.
#pragma once

#include <string>
#include <string_view>

namespace gloam {

bool IsWhiteSpace(char32_t code);  // the property White_Space
bool IsWordChar(char32_t code);    // what \w matches: letters, marks, digits, connectors

// `text` (valid UTF-8) in normalisation form C. Time grows as n log n whatever the text.
std::string NormalizeNfc(std::string_view text);

}  // namespace gloam
