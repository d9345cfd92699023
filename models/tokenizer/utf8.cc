#include "models/tokenizer/utf8.h"

#include <cstdint>
#include <cstring>

namespace gloam {
namespace {

// Lead byte's facts (Unicode, table 3-7): sequence length and the range of the second byte.
struct Lead {
  int length;  // 0: not a lead byte
  uint8_t second_min, second_max;
};

Lead LeadOf(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};  // no surrogates
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Bytes of ASCII at the start of `text`, eight at a time.
size_t AsciiPrefix(std::string_view text) {
  size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + i, 8);
    if (word & 0x8080808080808080u) break;
  }
  while (i < text.size() && static_cast<uint8_t>(text[i]) < 0x80) ++i;
  return i;
}

}  // namespace

Utf8Char DecodeUtf8(std::string_view text) {
  const auto byte = [&](int i) { return static_cast<uint8_t>(text[i]); };
  const Lead lead = LeadOf(byte(0));
  if (lead.length == 0) return {0xFFFD, 1, Utf8State::kInvalid};
  if (lead.length == 1) return {byte(0), 1, Utf8State::kValid};
  char32_t code = byte(0) & (0x7Fu >> lead.length);
  for (int i = 1; i < lead.length; ++i) {
    if (i == static_cast<int>(text.size())) return {0xFFFD, i, Utf8State::kIncomplete};
    const uint8_t min = i == 1 ? lead.second_min : 0x80;
    const uint8_t max = i == 1 ? lead.second_max : 0xBF;
    if (byte(i) < min || byte(i) > max) return {0xFFFD, i, Utf8State::kInvalid};
    code = (code << 6) | (byte(i) & 0x3Fu);
  }
  return {code, lead.length, Utf8State::kValid};
}

void AppendUtf8(char32_t code, std::string* out) {
  const auto tail = [code](int shift) {
    return static_cast<char>(0x80 | ((code >> shift) & 0x3F));
  };
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
  } else if (code < 0x800) {
    out->append({static_cast<char>(0xC0 | (code >> 6)), tail(0)});
  } else if (code < 0x10000) {
    out->append({static_cast<char>(0xE0 | (code >> 12)), tail(6), tail(0)});
  } else {
    out->append({static_cast<char>(0xF0 | (code >> 18)), tail(12), tail(6), tail(0)});
  }
}

bool IsValidUtf8(std::string_view text) {
  while (true) {
    text.remove_prefix(AsciiPrefix(text));
    if (text.empty()) return true;
    const Utf8Char c = DecodeUtf8(text);
    if (c.state != Utf8State::kValid) return false;
    text.remove_prefix(c.length);
  }
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    out.append(c.state == Utf8State::kValid ? text.substr(0, c.length) : kReplacementUtf8);
    text.remove_prefix(c.length);
  }
  return out;
}

}  // namespace gloam
