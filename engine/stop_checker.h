// StopChecker: decides when an answer ends and which of its text may go out: end-of-sequence and
// stop tokens, stop strings, and lengths. One per answer; engine thread only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/request.h"

namespace gloam {

// Finds the first of several strings in a text that arrives in pieces, and holds back what could
// still become one of them. Knuth-Morris-Pratt, so a byte costs the same however long they are.
class StopStringMatcher {
 public:
  explicit StopStringMatcher(const std::vector<std::string>& strings);

  // Appends `text` to `held`, moves what cannot be part of a stop string to `released`, and returns
  // the index of the stop string that ended, if one did. Then `released` ends before it (or with
  // it, when `include_stop`), and nothing may be fed any more. Of strings that end at the same
  // byte the longest is found.
  std::optional<int> Feed(std::string_view text, bool include_stop, std::string* released);

  // Everything held back; it can no longer become a stop string.
  std::string TakeHeld();

 private:
  struct Pattern {
    std::string text;
    std::vector<int> border;  // [text.size()] KMP's failure function
    int num_matched = 0;      // bytes of `text` that the input ends with
  };
  static int Advance(Pattern& pattern, char byte);

  std::vector<Pattern> patterns_;
  std::string held_;
};

class StopChecker {
 public:
  // `eos_ids` must outlive the checker. `max_new_tokens` >= 1 bounds the answer.
  StopChecker(const SamplingParams& params, std::span<const int32_t> eos_ids, int max_new_tokens);

  // Tokens that must not be drawn next: those that would end the answer before min_tokens.
  std::span<const int32_t> BannedTokens(int num_generated) const;

  struct TokenVerdict {
    std::optional<FinishReason> finish_reason;
    std::optional<std::string> stop_reason;
    bool has_text = true;  // false: the token's own text is not part of the answer
  };
  // What the `num_generated`-th token (from 1) means by itself.
  TokenVerdict CheckToken(int32_t token, int num_generated) const;

  struct TextVerdict {
    std::string text;                        // may go out
    std::optional<std::string> stop_string;  // the answer ends with it
  };
  // Takes the text that the `num_generated`-th token completed. `is_last`: no more will come, so
  // nothing stays held back.
  TextVerdict CheckText(std::string_view text, int num_generated, bool is_last);

 private:
  bool IsEos(int32_t token) const;

  std::vector<std::string> stop_strings_;
  std::vector<int32_t> stop_token_ids_;
  std::vector<int32_t> ending_tokens_;  // stop_token_ids, and the end of sequence where it counts
  std::span<const int32_t> eos_ids_;
  bool ignore_eos_;
  bool include_stop_;
  int min_tokens_;
  int max_new_tokens_;
  StopStringMatcher matcher_;
};

}  // namespace gloam
