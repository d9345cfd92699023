#include "models/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <array>
#include <string>

#include "fmt/ranges.h"

namespace gloam {
namespace {

// Patterns as the models' own tokenizer.json files state them.
constexpr std::string_view kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kDigit = R"(\p{N})";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct Row {
  std::string_view name;
  std::array<std::string_view, 2> patterns;  // empty: none
  bool normalize_nfc, ignore_merges;
};

constexpr Row kRows[] = {
    {"default", {kGpt2}, false, false},
    {"gpt-2", {kGpt2}, false, false},
    {"gpt2", {kGpt2}, false, false},
    {"smollm", {kDigit, kGpt2}, false, false},
    {"starcoder", {kDigit, kGpt2}, false, false},
    {"llama-bpe", {kLlama3}, false, true},
    {"llama3", {kLlama3}, false, true},
    {"qwen2", {kQwen2}, true, false},
    {"deepseek-r1-qwen", {kQwen2}, false, false},
    {"tekken", {kTekken}, false, true},
};

// Divides one word by one pattern.
Status Cut(const PreTokenizer::Split& split, std::string_view text, PreTokenizer::Word word,
           RegexMatcher& matcher, std::vector<PreTokenizer::Word>* out) {
  const std::string_view piece = text.substr(word.begin, word.end - word.begin);
  size_t pos = 0;
  while (pos < piece.size()) {
    GLOAM_ASSIGN_OR_RETURN(const RegexMatcher::Match match, matcher.Find(split.regex, piece, pos));
    const size_t gap_end = match.found ? match.begin : piece.size();
    if (split.keep_gaps && pos < gap_end) out->push_back({word.begin + pos, word.begin + gap_end});
    if (!match.found) break;
    if (split.keep_matches) out->push_back({word.begin + match.begin, word.begin + match.end});
    pos = match.end;
  }
  return OkStatus();
}

}  // namespace

std::string_view Gpt2Pattern() { return kGpt2; }

Status PreTokenizer::Run(std::string_view text, RegexMatcher& matcher,
                         std::vector<Word>* words) const {
  words->clear();
  if (!text.empty()) words->push_back({0, text.size()});
  std::vector<Word> cut;
  for (const Split& split : splits_) {
    cut.clear();
    for (const Word& word : *words) {
      GLOAM_RETURN_IF_ERROR(Cut(split, text, word, matcher, &cut));
    }
    words->swap(cut);
  }
  return OkStatus();
}

StatusOr<NamedPreTokenizer> MakePreTokenizer(std::string_view pre) {
  const auto* row = std::find_if(std::begin(kRows), std::end(kRows),
                                 [pre](const Row& r) { return r.name == pre; });
  if (row == std::end(kRows)) {
    std::vector<std::string_view> names;
    for (const Row& r : kRows) names.push_back(r.name);
    return Unimplemented("tokenizer.ggml.pre: '{}' is not supported; supported are {}", pre,
                         fmt::join(names, ", "));
  }
  std::vector<PreTokenizer::Split> splits;
  for (const std::string_view pattern : row->patterns) {
    if (pattern.empty()) continue;
    GLOAM_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(pattern));
    splits.push_back({std::move(regex)});
  }
  return NamedPreTokenizer{PreTokenizer(std::move(splits)), row->normalize_nfc, row->ignore_merges};
}

}  // namespace gloam
