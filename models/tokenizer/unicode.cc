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

// Characters with a combining class or a composition that are newer than Unicode 9, whose tables
// Hugging Face's normaliser has: to it they are letters like any other, and models were trained on
// its output. Found by comparing it with Unicode 14 (tests/goldens/README.md), and 15's additions.
struct CodeRange {
  char32_t first, last;
};
constexpr CodeRange kNewerThanReference[] = {
    {0x07FD, 0x07FD},   {0x0898, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C},   {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27},
    {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
    {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};

bool IsNewerThanReference(char32_t code) {
  const auto* range =
      std::lower_bound(std::begin(kNewerThanReference), std::end(kNewerThanReference), code,
                       [](const CodeRange& r, char32_t c) { return r.last < c; });
  return range != std::end(kNewerThanReference) && range->first <= code;
}

// Appends the full canonical decomposition of `code`.
void Decompose(char32_t code, std::vector<utf8proc_int32_t>* codes) {
  constexpr int kMaxExpansion = 32;  // far above any canonical decomposition (4)
  utf8proc_int32_t buffer[kMaxExpansion];
  int boundary_class = 0;
  const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code), buffer, kMaxExpansion,
                                         UTF8PROC_DECOMPOSE, &boundary_class);
  GLOAM_CHECK(n >= 0 && n <= kMaxExpansion);
  codes->insert(codes->end(), buffer, buffer + n);
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
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> codes;  // decomposed, since the last character that stands alone
  const auto compose = [&] {
    OrderMarks(&codes);
    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    const auto n = utf8proc_normalize_utf32(codes.data(),
                                            static_cast<utf8proc_ssize_t>(codes.size()), options);
    GLOAM_CHECK(n >= 0);
    for (utf8proc_ssize_t i = 0; i < n; ++i) AppendUtf8(static_cast<char32_t>(codes[i]), &out);
    codes.clear();
  };
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    text.remove_prefix(c.length);
    if (IsNewerThanReference(c.code)) {
      compose();
      AppendUtf8(c.code, &out);
    } else {
      Decompose(c.code, &codes);
    }
  }
  compose();
  return out;
}

}  // namespace gloam
