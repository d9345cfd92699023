#include "models/tokenizer/composite_tokenizer.h"

#include <algorithm>

#include "base/check.h"
#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

// Control tokens that end an answer in the families we know, whatever a file's eos field says.
constexpr std::string_view kEndNames[] = {"<|im_end|>",    "<|eot_id|>", "<|end_of_text|>",
                                          "<|endoftext|>", "</s>",       "<|end|>"};

class CompositeTokenizer final : public Tokenizer {
 public:
  explicit CompositeTokenizer(TokenizerParts parts)
      : parts_(std::move(parts)), added_tokens_(std::move(parts_.added_tokens)) {
    for (const std::string_view name : kEndNames) {
      const auto id = parts_.table->Find(name);
      if (id && parts_.table->kind(*id) == TokenKind::kControl) parts_.eos_ids.push_back(*id);
    }
    auto& ids = parts_.eos_ids;
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  }

  int vocab_size() const override { return parts_.table->size(); }

  StatusOr<std::vector<int32_t>> Encode(std::span<const TextPart> parts,
                                        bool add_special) const override;

  std::string_view TokenBytes(int32_t id, bool skip_special) const override {
    GLOAM_CHECK(id >= 0 && id < vocab_size());
    if (skip_special && parts_.table->IsSpecial(id)) return "";
    return parts_.table->bytes(id);
  }

  bool strips_leading_space() const override { return parts_.strips_leading_space; }

  bool IsSpecial(int32_t id) const override {
    GLOAM_CHECK(id >= 0 && id < vocab_size());
    return parts_.table->IsSpecial(id);
  }

  std::optional<int32_t> FindToken(std::string_view name) const override {
    return parts_.table->Find(name);
  }

  std::optional<int32_t> bos_id() const override { return parts_.bos_id; }
  std::span<const int32_t> eos_ids() const override { return parts_.eos_ids; }

 private:
  TokenizerParts parts_;
  AddedTokens added_tokens_;
};

// The parts as one text, with the stretches where special tokens are allowed.
std::string Join(std::span<const TextPart> parts, std::vector<AddedTokens::Range>* allowed) {
  std::string text;
  size_t size = 0;
  for (const TextPart& part : parts) size += part.text.size();
  text.reserve(size);
  for (const TextPart& part : parts) {
    if (part.allow_special && !part.text.empty()) {
      const AddedTokens::Range range{text.size(), text.size() + part.text.size()};
      if (!allowed->empty() && allowed->back().end == range.begin) {
        allowed->back().end = range.end;
      } else {
        allowed->push_back(range);
      }
    }
    text.append(part.text);
  }
  return text;
}

StatusOr<std::vector<int32_t>> CompositeTokenizer::Encode(std::span<const TextPart> parts,
                                                          bool add_special) const {
  std::vector<AddedTokens::Range> allowed;
  const std::string text = Join(parts, &allowed);
  std::vector<int32_t> ids;
  if (add_special) ids = parts_.prefix;
  for (const AddedTokens::Piece& piece : added_tokens_.Split(text, allowed)) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
      continue;
    }
    const auto plain = std::string_view(text).substr(piece.begin, piece.end - piece.begin);
    const bool at_start = piece.begin == 0;
    if (IsValidUtf8(plain)) {
      GLOAM_RETURN_IF_ERROR(parts_.encoder->Encode(plain, at_start, &ids));
    } else {
      GLOAM_RETURN_IF_ERROR(parts_.encoder->Encode(ReplaceInvalidUtf8(plain), at_start, &ids));
    }
  }
  if (add_special) ids.insert(ids.end(), parts_.suffix.begin(), parts_.suffix.end());
  return ids;
}

}  // namespace

std::unique_ptr<Tokenizer> MakeCompositeTokenizer(TokenizerParts parts) {
  return std::make_unique<CompositeTokenizer>(std::move(parts));
}

}  // namespace gloam
