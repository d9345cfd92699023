#include "server/token_text.h"

#include <algorithm>

#include "fmt/format.h"
#include "models/tokenizer/utf8.h"

namespace gloam {

std::string TokenText(std::string_view bytes) {
  if (IsValidUtf8(bytes)) return std::string(bytes);
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("\\x{:02x}", byte);
  return text;
}

std::string CompletionTokenText(std::string_view bytes) {
  return IsValidUtf8(bytes) ? std::string(bytes) : "bytes:" + TokenText(bytes);
}

int64_t CountCharacters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(),
                       [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; });
}

}  // namespace gloam
