// Prompts of evaluation items: text in three parts, turned into tokens of which the last are fed in
// decode mode. As the sparse decode path only shows its effect on tokens that are decoded, the
// context alone is prefilled; the question and the beginning of the answer run under the policy.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace gloam {

// Text to tokens, of a model in this process or behind a URL. Any thread.
class PromptTokenizer {
 public:
  virtual ~PromptTokenizer() = default;

  // Tokens of a text; with `add_special` after what the model puts before every text (BOS).
  [[nodiscard]] virtual StatusOr<std::vector<int32_t>> Encode(const std::string& text,
                                                              bool add_special) = 0;

  // Tokens of a chat with this message of the user, up to where the answer begins. Errors: also
  // those of a model without a chat template.
  [[nodiscard]] virtual StatusOr<std::vector<int32_t>> EncodeChat(const std::string& message) = 0;

  // The text of tokens, special ones as the vocabulary writes them.
  [[nodiscard]] virtual StatusOr<std::string> Decode(std::span<const int32_t> tokens) = 0;
};

struct PromptText {
  std::string context;
  std::string question;       // follows the context in the same message
  std::string answer_prefix;  // what the answer begins with
};

struct Prompt {
  std::vector<int32_t> tokens;
  int num_decoded = 0;  // of the last tokens: those after the context; at least 1

  int num_tokens() const { return static_cast<int>(tokens.size()); }
};

// The tokens of `text`, as a chat or as plain text. Errors: kInvalidArgument for an empty text, and
// the tokenizer's.
[[nodiscard]] StatusOr<Prompt> BuildPrompt(PromptTokenizer& tokenizer, const PromptText& text,
                                           bool chat);

// A prompt of at most `max_tokens` tokens from the largest `size` in [0, max_size] that fits.
// `make` gives the text of a size, the same whenever it is asked; longer for larger sizes. Errors:
// kInvalidArgument when size 0 is too long.
struct FittedPrompt {
  Prompt prompt;
  int size = 0;
};
[[nodiscard]] StatusOr<FittedPrompt> FitPrompt(PromptTokenizer& tokenizer, bool chat,
                                               int max_tokens, int max_size,
                                               const std::function<PromptText(int size)>& make);

}  // namespace gloam
