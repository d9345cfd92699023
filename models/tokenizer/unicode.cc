#include "models/tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/check.h"
#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

// Characters below U+0300 are their own form C and never combine among themselves.
bool IsSurelyNfc(std::string_view text) {
  return std::none_of(text.begin(), text.end(),
                      [](char c) { return static_cast<uint8_t>(c) >= 0xCC; });
}

int CombiningClass(char32_t code) {
  return utf8proc_get_property(static_cast<utf8proc_int32_t>(code))->combining_class;
}

// Full canonical decomposition, not yet in canonical order.
std::vector<utf8proc_int32_t> Decompose(std::string_view text) {
  constexpr int kMaxExpansion = 32;  // far above any canonical decomposition (4)
  std::vector<utf8proc_int32_t> codes;
  codes.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    utf8proc_int32_t buffer[kMaxExpansion];
    int boundary_class = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code), buffer,
                                           kMaxExpansion, UTF8PROC_DECOMPOSE, &boundary_class);
    GLOAM_CHECK(n >= 0 && n <= kMaxExpansion);
    codes.insert(codes.end(), buffer, buffer + n);
    text.remove_prefix(c.length);
  }
  return codes;
}

// Sorts each run of combining marks by class. utf8proc's own loop takes quadratic time on a long
// run, which a client could send.
void OrderMarks(std::vector<utf8proc_int32_t>* codes) {
  for (auto begin = codes->begin(); begin != codes->end();) {
    if (CombiningClass(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end = std::find_if(begin, codes->end(),
                                  [](utf8proc_int32_t c) { return CombiningClass(c) == 0; });
    std::stable_sort(begin, end, [](utf8proc_int32_t a, utf8proc_int32_t b) {
      return CombiningClass(a) < CombiningClass(b);
    });
    begin = end;
  }
}

}  // namespace

bool IsWhiteSpace(char32_t code) {
  if ((code >= 9 && code <= 13) || code == 0x85) return true;
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code));
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}

bool IsWordChar(char32_t code) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code));
  switch (category) {
    case UTF8PROC_CATEGORY_NO:
      return false;
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL;
  }
}

std::string NormalizeNfc(std::string_view text) {
  if (IsSurelyNfc(text)) return std::string(text);
  std::vector<utf8proc_int32_t> codes = Decompose(text);
  OrderMarks(&codes);
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  const auto n =
      utf8proc_normalize_utf32(codes.data(), static_cast<utf8proc_ssize_t>(codes.size()), options);
  GLOAM_CHECK(n >= 0);
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < n; ++i) AppendUtf8(static_cast<char32_t>(codes[i]), &out);
  return out;
}

}  // namespace gloam
