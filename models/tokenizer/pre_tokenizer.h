// PreTokenizer: cuts normalised text into the words inside which merges happen, by a sequence of
// regular expressions as the model's files state them. Immutable; any thread.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "models/tokenizer/regex.h"

namespace gloam {

class PreTokenizer {
 public:
  // One cut: each piece so far is divided into matches and what lies between them.
  struct Split {
    Regex regex;
    bool keep_matches = true;
    bool keep_gaps = true;
  };
  struct Word {
    size_t begin = 0, end = 0;
  };

  PreTokenizer() = default;  // one word
  explicit PreTokenizer(std::vector<Split> splits) : splits_(std::move(splits)) {}

  // The words of `text` (valid UTF-8), in order, none empty.
  // Errors: kResourceExhausted when a pattern's match limit is hit.
  [[nodiscard]] Status Run(std::string_view text, RegexMatcher& matcher,
                           std::vector<Word>* words) const;

 private:
  std::vector<Split> splits_;
};

// What a GGUF file's `tokenizer.ggml.pre` stands for.
struct NamedPreTokenizer {
  PreTokenizer pre_tokenizer;
  bool normalize_nfc = false;
  bool ignore_merges = false;  // a word that is a token is taken whole
};

// Errors: kUnimplemented naming `pre` and the supported names.
[[nodiscard]] StatusOr<NamedPreTokenizer> MakePreTokenizer(std::string_view pre);

// GPT-2's pattern: Hugging Face's ByteLevel pre-tokenizer.
std::string_view Gpt2Pattern();

}  // namespace gloam
