#include "engine/detokenizer.h"

#include <string_view>
#include <utility>

#include "models/tokenizer/utf8.h"

namespace gloam {

StreamingDetokenizer::StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer),
      skip_special_(skip_special),
      strip_space_(tokenizer.strips_leading_space()) {}

std::string StreamingDetokenizer::Append(int32_t token) {
  std::string_view bytes = tokenizer_.TokenBytes(token, skip_special_);
  if (strip_space_ && !bytes.empty()) {
    if (bytes.front() == ' ') bytes.remove_prefix(1);
    strip_space_ = false;
  }
  pending_ += bytes;

  std::string text;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Char next = DecodeUtf8(rest);
    if (next.state == Utf8State::kIncomplete) break;
    if (next.state == Utf8State::kValid) {
      text += rest.substr(0, next.length);
    } else {
      text += kReplacementUtf8;
    }
    rest.remove_prefix(next.length);
  }
  pending_ = std::string(rest);
  return text;
}

std::string StreamingDetokenizer::Flush() {
  return ReplaceInvalidUtf8(std::exchange(pending_, {}));
}

}  // namespace gloam
