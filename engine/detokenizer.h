// StreamingDetokenizer: one answer's tokens to text, as they come. Owned by the answer; engine
// thread.
#pragma once

#include <cstdint>
#include <string>

#include "models/tokenizer/tokenizer.h"

namespace gloam {

// Text is given out in whole characters: bytes that may still become one wait for the next token,
// bytes that cannot become U+FFFD. Everything given out, with Flush() last, equals
// Tokenizer::Decode of all tokens with ill-formed stretches replaced.
class StreamingDetokenizer {
 public:
  // `tokenizer` must outlive this.
  StreamingDetokenizer(const Tokenizer& tokenizer, bool skip_special);

  // The text that `token` completes; may be empty.
  std::string Append(int32_t token);

  // What still waits, as U+FFFD; empty when nothing does.
  std::string Flush();

 private:
  const Tokenizer& tokenizer_;
  const bool skip_special_;
  bool strip_space_;     // the next text starts the answer, and a leading space there is dropped
  std::string pending_;  // up to 3 bytes of an incomplete character
};

}  // namespace gloam
