// TokenTable: every token's name, kind and bytes. Built once by a loader, then immutable; any
// thread. Views that it returns live as long as the table.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"

namespace gloam {

// GGUF's numbers.
enum class TokenKind : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,      // never part of plain text: <|im_end|>
  kUserDefined = 4,  // plain text that is always one token: <tool_call>
  kUnused = 5,
  kByte = 6,  // <0xE2>
};

// How a normal token's name spells its bytes.
enum class TokenSpelling {
  kByteChars,  // GPT-2's alphabet: one printable character a byte
  kMetaspace,  // text with U+2581 for a space; <0xE2> for a byte
};

class TokenTable {
 public:
  // `names` and `kinds` are parallel. Errors: kInvalidArgument naming the token when a byte token
  // is not of the form <0xE2>.
  [[nodiscard]] static StatusOr<TokenTable> Make(std::vector<std::string> names,
                                                 std::vector<TokenKind> kinds,
                                                 TokenSpelling spelling);

  int size() const { return static_cast<int>(kinds_.size()); }
  TokenKind kind(int32_t id) const { return kinds_[id]; }
  const std::string& name(int32_t id) const { return names_[id]; }

  // The text that the token stands for; the name of control and unknown tokens, "" of unused ones.
  std::string_view bytes(int32_t id) const {
    return std::string_view(arena_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
  }
  std::optional<int32_t> Find(std::string_view name) const;

  // True for the kinds that decoding with `skip_special` leaves out.
  bool IsSpecial(int32_t id) const {
    return kinds_[id] == TokenKind::kControl || kinds_[id] == TokenKind::kUnknown;
  }

 private:
  std::vector<std::string> names_;
  std::vector<TokenKind> kinds_;
  std::string arena_;
  std::vector<uint32_t> offsets_;
  absl::flat_hash_map<std::string_view, int32_t> ids_;  // keys are views into names_
};

// The bytes that `name` spells in GPT-2's alphabet; `name` itself where it holds other characters.
std::string BytesFromByteChars(std::string_view name);

// GPT-2's character for a byte, in UTF-8.
std::string ByteCharOf(uint8_t byte);

}  // namespace gloam
