// Tokenizer: text to token ids and back. Implementations: SentencePiece and byte-level BPE, built
// from tokenizer.model, tokenizer.json or GGUF metadata. Immutable after loading; any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gloam {

// A piece of a prompt. The whole prompt is tokenised as one text; special tokens ("<|im_end|>")
// are recognised only where they lie entirely inside parts that allow them, so that a user's
// content cannot forge them.
struct TextPart {
  std::string_view text;
  bool allow_special = false;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  virtual int vocab_size() const = 0;

  // Token ids of the concatenated parts. With `add_special` the model's own prefix and suffix
  // (BOS where its file says so) are added. Any bytes are accepted; invalid UTF-8 becomes byte
  // tokens or U+FFFD as the tokenizer's family does. Errors: kResourceExhausted when a
  // pre-tokeniser's match limit is hit.
  [[nodiscard]] virtual StatusOr<std::vector<int32_t>> Encode(std::span<const TextPart> parts,
                                                              bool add_special) const = 0;

  // Bytes that a token stands for in the output text; may be part of a UTF-8 character. Empty for
  // special (control) tokens when `skip_special`. `id` in [0, vocab_size()); ids that the
  // vocabulary leaves unused give "".
  virtual std::string_view TokenBytes(int32_t id, bool skip_special) const = 0;

  // True when decoding drops a leading space at the start of a text (SentencePiece's dummy prefix).
  virtual bool strips_leading_space() const = 0;

  // True for control tokens (BOS, EOS, <|im_end|>, ...).
  virtual bool IsSpecial(int32_t id) const = 0;

  // The id of a token given as the vocabulary writes it, e.g. "<|im_end|>".
  virtual std::optional<int32_t> FindToken(std::string_view name) const = 0;

  virtual std::optional<int32_t> bos_id() const = 0;
  // Tokens that end an answer (end of text, end of turn), as the model's files say.
  virtual std::span<const int32_t> eos_ids() const = 0;

  // Whole-text decoding: the concatenated bytes, leading space stripped where the family does.
  // Invalid UTF-8 is kept as bytes.
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const;
};

}  // namespace gloam
