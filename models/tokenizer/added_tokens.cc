#include "models/tokenizer/added_tokens.h"

#include <algorithm>

#include "models/tokenizer/unicode.h"
#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

// Where the character before `pos` begins. `pos` > 0.
size_t PreviousChar(std::string_view text, size_t pos) {
  do {
    --pos;
  } while (pos > 0 && (static_cast<uint8_t>(text[pos]) & 0xC0) == 0x80);
  return pos;
}

bool WordCharBefore(std::string_view text, size_t pos) {
  return pos > 0 && IsWordChar(DecodeUtf8(text.substr(PreviousChar(text, pos))).code);
}

bool WordCharAfter(std::string_view text, size_t pos) {
  return pos < text.size() && IsWordChar(DecodeUtf8(text.substr(pos)).code);
}

size_t SkipSpaceLeft(std::string_view text, size_t pos, size_t limit) {
  while (pos > limit) {
    const size_t previous = PreviousChar(text, pos);
    if (!IsWhiteSpace(DecodeUtf8(text.substr(previous)).code)) break;
    pos = previous;
  }
  return std::max(pos, limit);
}

size_t SkipSpaceRight(std::string_view text, size_t pos) {
  while (pos < text.size()) {
    const Utf8Char c = DecodeUtf8(text.substr(pos));
    if (!IsWhiteSpace(c.code)) break;
    pos += c.length;
  }
  return pos;
}

uint64_t Edge(uint32_t node, char byte) {
  return (uint64_t{node} << 8) | static_cast<uint8_t>(byte);
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  token_at_.push_back(-1);
  for (size_t i = 0; i < tokens_.size(); ++i) {
    first_byte_[static_cast<uint8_t>(tokens_[i].content[0])] = true;
    uint32_t node = 0;
    for (const char byte : tokens_[i].content) {
      const auto [it, is_new] =
          children_.try_emplace(Edge(node, byte), static_cast<uint32_t>(token_at_.size()));
      if (is_new) token_at_.push_back(-1);
      node = it->second;
    }
    if (token_at_[node] < 0) token_at_[node] = static_cast<int32_t>(i);
  }
}

int AddedTokens::LongestAt(std::string_view text, size_t pos, size_t special_end) const {
  int longest = -1;
  uint32_t node = 0;
  for (size_t i = pos; i < text.size(); ++i) {
    const auto it = children_.find(Edge(node, text[i]));
    if (it == children_.end()) break;
    node = it->second;
    const int32_t token = token_at_[node];
    if (token >= 0 && (!tokens_[token].special || i < special_end)) longest = token;
  }
  return longest;
}

std::vector<AddedTokens::Piece> AddedTokens::Split(std::string_view text,
                                                   const std::vector<Range>& allowed) const {
  std::vector<Piece> pieces;
  size_t plain_begin = 0;  // text from here on is not yet in a piece
  auto range = allowed.begin();
  for (size_t pos = 0; pos < text.size();) {
    if (!first_byte_[static_cast<uint8_t>(text[pos])]) {
      ++pos;
      continue;
    }
    while (range != allowed.end() && range->end <= pos) ++range;
    const bool inside = range != allowed.end() && range->begin <= pos;
    const int index = LongestAt(text, pos, inside ? range->end : pos);
    if (index < 0) {
      ++pos;
      continue;
    }
    const AddedToken& token = tokens_[index];
    size_t begin = pos, end = pos + token.content.size();
    pos = end;
    if (token.single_word && (WordCharBefore(text, begin) || WordCharAfter(text, end))) continue;
    if (token.lstrip) begin = SkipSpaceLeft(text, begin, plain_begin);
    if (token.rstrip) end = SkipSpaceRight(text, end);
    if (plain_begin < begin) pieces.push_back({-1, plain_begin, begin});
    pieces.push_back({token.id, begin, end});
    plain_begin = end;
    pos = end;
  }
  if (plain_begin < text.size()) pieces.push_back({-1, plain_begin, text.size()});
  return pieces;
}

}  // namespace gloam
