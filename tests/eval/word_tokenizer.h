// WordTokenizer: what the tests of tasks count tokens with: words, runs of white space and other
// characters are a token each. Chats are wrapped in two tokens.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "eval/prompt.h"

namespace gloam {

class WordTokenizer final : public PromptTokenizer {
 public:
  static constexpr int32_t kBos = 0;
  static constexpr int32_t kUser = 1;
  static constexpr int32_t kAssistant = 2;

  StatusOr<std::vector<int32_t>> Encode(const std::string& text, bool add_special) override;
  StatusOr<std::vector<int32_t>> EncodeChat(const std::string& message) override;
  StatusOr<std::string> Decode(std::span<const int32_t> tokens) override;

  // The text of all tokens, special ones as "<0>".
  std::string Text(std::span<const int32_t> tokens) const;

 private:
  int32_t IdOf(const std::string& piece);

  std::vector<std::string> pieces_ = {"<0>", "<1>", "<2>"};
  std::map<std::string, int32_t> ids_;
};

}  // namespace gloam
