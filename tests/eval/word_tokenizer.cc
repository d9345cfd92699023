#include "tests/eval/word_tokenizer.h"

#include <cctype>

namespace gloam {
namespace {

enum class Kind { kWord, kSpace, kOther };

Kind KindOf(char c) {
  if (std::isspace(static_cast<unsigned char>(c)) != 0) return Kind::kSpace;
  return std::isalnum(static_cast<unsigned char>(c)) != 0 ? Kind::kWord : Kind::kOther;
}

}  // namespace

int32_t WordTokenizer::IdOf(const std::string& piece) {
  const auto [at, is_new] = ids_.try_emplace(piece, static_cast<int32_t>(pieces_.size()));
  if (is_new) pieces_.push_back(piece);
  return at->second;
}

StatusOr<std::vector<int32_t>> WordTokenizer::Encode(const std::string& text, bool add_special) {
  std::vector<int32_t> ids;
  if (add_special) ids.push_back(kBos);
  for (size_t begin = 0; begin < text.size();) {
    size_t end = begin + 1;
    const Kind kind = KindOf(text[begin]);
    while (kind != Kind::kOther && end < text.size() && KindOf(text[end]) == kind) ++end;
    ids.push_back(IdOf(text.substr(begin, end - begin)));
    begin = end;
  }
  return ids;
}

StatusOr<std::vector<int32_t>> WordTokenizer::EncodeChat(const std::string& message) {
  GLOAM_ASSIGN_OR_RETURN(std::vector<int32_t> ids, Encode(message, /*add_special=*/false));
  ids.insert(ids.begin(), kUser);
  ids.push_back(kAssistant);
  return ids;
}

StatusOr<std::string> WordTokenizer::Decode(std::span<const int32_t> tokens) {
  std::string text;
  for (const int32_t token : tokens) {
    if (token > kAssistant) text += pieces_[static_cast<size_t>(token)];
  }
  return text;
}

std::string WordTokenizer::Text(std::span<const int32_t> tokens) const {
  std::string text;
  for (const int32_t token : tokens) text += pieces_[static_cast<size_t>(token)];
  return text;
}

}  // namespace gloam
