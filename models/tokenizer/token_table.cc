#include "models/tokenizer/token_table.h"

#include <array>
#include <cstdlib>
#include <limits>

#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

constexpr std::string_view kMetaspace = "\xE2\x96\x81";  // U+2581

// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up.
struct ByteAlphabet {
  std::array<char32_t, 256> char_of;
  std::array<int16_t, 324> byte_of;  // -1: no byte

  ByteAlphabet() {
    byte_of.fill(-1);
    char32_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      char_of[byte] = printable ? static_cast<char32_t>(byte) : next++;
      byte_of[char_of[byte]] = static_cast<int16_t>(byte);
    }
  }
};

const ByteAlphabet& Alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// The byte of "<0xE2>", or -1.
int ByteOfName(std::string_view name) {
  if (name.size() != 6 || !name.starts_with("<0x") || name[5] != '>') return -1;
  char* end = nullptr;
  const std::string digits(name.substr(3, 2));
  const long value = std::strtol(digits.c_str(), &end, 16);
  return end == digits.c_str() + 2 ? static_cast<int>(value) : -1;
}

std::string MetaspaceToSpace(std::string_view name) {
  std::string out;
  while (!name.empty()) {
    const size_t found = name.find(kMetaspace);
    out.append(name.substr(0, found));
    if (found == std::string_view::npos) break;
    out += ' ';
    name.remove_prefix(found + kMetaspace.size());
  }
  return out;
}

}  // namespace

std::string BytesFromByteChars(std::string_view name) {
  const ByteAlphabet& alphabet = Alphabet();
  std::string out;
  for (std::string_view rest = name; !rest.empty();) {
    const Utf8Char c = DecodeUtf8(rest);
    if (c.code >= alphabet.byte_of.size() || alphabet.byte_of[c.code] < 0) {
      return std::string(name);
    }
    out += static_cast<char>(alphabet.byte_of[c.code]);
    rest.remove_prefix(c.length);
  }
  return out;
}

std::string ByteCharOf(uint8_t byte) {
  std::string out;
  AppendUtf8(Alphabet().char_of[byte], &out);
  return out;
}

StatusOr<TokenTable> TokenTable::Make(std::vector<std::string> names, std::vector<TokenKind> kinds,
                                      TokenSpelling spelling) {
  TokenTable table;
  table.names_ = std::move(names);
  table.kinds_ = std::move(kinds);
  table.offsets_.reserve(table.names_.size() + 1);
  table.offsets_.push_back(0);
  table.ids_.reserve(table.names_.size());
  for (size_t id = 0; id < table.names_.size(); ++id) {
    const std::string& name = table.names_[id];
    switch (table.kinds_[id]) {
      case TokenKind::kNormal:
        table.arena_ += spelling == TokenSpelling::kByteChars ? BytesFromByteChars(name)
                                                              : MetaspaceToSpace(name);
        break;
      case TokenKind::kByte: {
        const int byte = ByteOfName(name);
        if (byte < 0) return InvalidArgument("token {}: '{}' is not a byte token", id, name);
        table.arena_ += static_cast<char>(byte);
        break;
      }
      case TokenKind::kUserDefined:
        table.arena_ += spelling == TokenSpelling::kMetaspace ? MetaspaceToSpace(name) : name;
        break;
      case TokenKind::kUnknown:
      case TokenKind::kControl:
        table.arena_ += name;
        break;
      case TokenKind::kUnused:
        break;
    }
    if (table.arena_.size() > std::numeric_limits<uint32_t>::max()) {
      return InvalidArgument("the vocabulary's text is over 4 GiB");
    }
    table.offsets_.push_back(static_cast<uint32_t>(table.arena_.size()));
    table.ids_.emplace(name, static_cast<int32_t>(id));
  }
  return table;
}

std::optional<int32_t> TokenTable::Find(std::string_view name) const {
  const auto it = ids_.find(name);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

}  // namespace gloam
