#include "eval/prompt.h"

#include <algorithm>
#include <cmath>

namespace gloam {
namespace {

StatusOr<std::vector<int32_t>> EncodeAll(PromptTokenizer& tokenizer, const PromptText& text,
                                         bool chat) {
  if (!chat) {
    return tokenizer.Encode(text.context + text.question + text.answer_prefix,
                            /*add_special=*/true);
  }
  GLOAM_ASSIGN_OR_RETURN(std::vector<int32_t> tokens,
                         tokenizer.EncodeChat(text.context + text.question));
  if (text.answer_prefix.empty()) return tokens;
  GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> prefix,
                         tokenizer.Encode(text.answer_prefix, /*add_special=*/false));
  tokens.insert(tokens.end(), prefix.begin(), prefix.end());
  return tokens;
}

}  // namespace

StatusOr<Prompt> BuildPrompt(PromptTokenizer& tokenizer, const PromptText& text, bool chat) {
  Prompt prompt;
  GLOAM_ASSIGN_OR_RETURN(prompt.tokens, EncodeAll(tokenizer, text, chat));
  if (prompt.tokens.empty()) return InvalidArgument("a prompt has no tokens");
  // The tokens that do not depend on the question are the context's.
  GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> context,
                         EncodeAll(tokenizer, {.context = text.context}, chat));
  const auto [end, _] =
      std::mismatch(prompt.tokens.begin(), prompt.tokens.end(), context.begin(), context.end());
  const auto num_shared = static_cast<int>(end - prompt.tokens.begin());
  prompt.num_decoded = std::max(1, prompt.num_tokens() - num_shared);
  return prompt;
}

StatusOr<FittedPrompt> FitPrompt(PromptTokenizer& tokenizer, bool chat, int max_tokens,
                                 int max_size, const std::function<PromptText(int size)>& make) {
  const auto count = [&](int size) -> StatusOr<int> {
    GLOAM_ASSIGN_OR_RETURN(const auto tokens, EncodeAll(tokenizer, make(size), chat));
    return static_cast<int>(tokens.size());
  };
  int low = 0, high = max_size + 1;  // the largest known to fit, the smallest known not to
  GLOAM_ASSIGN_OR_RETURN(int low_tokens, count(0));
  if (low_tokens > max_tokens) {
    return InvalidArgument("a prompt without any filler has {} tokens, more than the {} asked for",
                           low_tokens, max_tokens);
  }
  double tokens_per_unit = 16;    // refined with every try
  constexpr int kMaxGuesses = 8;  // where units differ much in length, halving ends sooner
  for (int tries = 0; high - low > 1; ++tries) {
    const double room = (max_tokens - low_tokens) / tokens_per_unit;
    const int guess = static_cast<int>(std::min<double>(room, high - low - 1));
    const bool halve = tries >= kMaxGuesses && high <= max_size;
    const int size = low + std::max(1, halve ? (high - low) / 2 : guess);
    GLOAM_ASSIGN_OR_RETURN(const int tokens, count(size));
    tokens_per_unit = std::max(0.5, static_cast<double>(tokens - low_tokens) / (size - low));
    if (tokens > max_tokens) {
      high = size;
    } else {
      low = size;
      low_tokens = tokens;
    }
  }
  FittedPrompt fitted;
  fitted.size = low;
  GLOAM_ASSIGN_OR_RETURN(fitted.prompt, BuildPrompt(tokenizer, make(low), chat));
  return fitted;
}

}  // namespace gloam
