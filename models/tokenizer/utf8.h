// UTF-8 decoding with the error rule of Unicode ("maximal subpart") and of Python's
// errors="replace": every ill-formed stretch counts as one U+FFFD. Pure functions.
#pragma once

#include <string>
#include <string_view>

namespace gloam {

enum class Utf8State {
  kValid,
  kInvalid,     // `length` bytes are one ill-formed stretch
  kIncomplete,  // the text ends inside a character that may still become valid
};

struct Utf8Char {
  char32_t code = 0;  // U+FFFD unless valid
  int length = 0;     // bytes taken, 1-4
  Utf8State state = Utf8State::kValid;
};

inline constexpr std::string_view kReplacementUtf8 = "\xEF\xBF\xBD";

// The first character of `text`, which is not empty.
Utf8Char DecodeUtf8(std::string_view text);

void AppendUtf8(char32_t code, std::string* out);

bool IsValidUtf8(std::string_view text);

// `text` with every ill-formed stretch replaced by U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view text);

}  // namespace gloam
