// Regex: a pattern in the syntax of Hugging Face's tokenizer files (Oniguruma), run by PCRE2 with
// UTF, Unicode properties and JIT. Where the two engines read a pattern differently it is
// translated; what has no translation is refused. Immutable; a Matcher belongs to one thread.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace gloam {

class Regex {
 public:
  // Errors: kInvalidArgument with PCRE2's message, kUnimplemented naming the construct.
  [[nodiscard]] static StatusOr<Regex> Compile(std::string_view pattern);

  // A pattern that matches `text` and nothing else.
  static std::string Quote(std::string_view text);

  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

 private:
  friend class RegexMatcher;
  struct Code;
  explicit Regex(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

// Match state of one thread, for any number of patterns and texts.
class RegexMatcher {
 public:
  struct Match {
    size_t begin = 0, end = 0;
    bool found = false;
  };

  RegexMatcher();
  ~RegexMatcher();
  RegexMatcher(const RegexMatcher&) = delete;
  RegexMatcher& operator=(const RegexMatcher&) = delete;

  // The first non-empty match in `text` (valid UTF-8) that begins at `start` or later.
  // Errors: kResourceExhausted when the match limit is hit.
  [[nodiscard]] StatusOr<Match> Find(const Regex& regex, std::string_view text, size_t start);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gloam
