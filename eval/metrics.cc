#include "eval/metrics.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <unordered_map>

#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

constexpr std::string_view kSpaces = " \t\n\r\f\v";

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

std::string Lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::vector<std::string> Words(std::string_view text) {
  std::vector<std::string> words;
  for (size_t begin = text.find_first_not_of(kSpaces); begin != text.npos;) {
    const size_t end = std::min(text.find_first_of(kSpaces, begin), text.size());
    words.emplace_back(text.substr(begin, end - begin));
    begin = text.find_first_not_of(kSpaces, end);
  }
  return words;
}

// Maximal runs of digits.
std::vector<std::string> Numbers(std::string_view text) {
  std::vector<std::string> numbers;
  for (size_t i = 0; i < text.size(); ++i) {
    if (!IsDigit(text[i])) continue;
    if (i == 0 || !IsDigit(text[i - 1])) numbers.emplace_back();
    numbers.back() += text[i];
  }
  return numbers;
}

double ShareEqual(const std::vector<std::string>& numbers, std::string_view wanted) {
  if (numbers.empty()) return 0;
  const auto equal = std::count(numbers.begin(), numbers.end(), wanted);
  return static_cast<double>(equal) / static_cast<double>(numbers.size());
}

std::vector<char32_t> CodePoints(std::string_view text) {
  std::vector<char32_t> points;
  while (!text.empty()) {
    const Utf8Char next = DecodeUtf8(text);
    points.push_back(next.code);
    text.remove_prefix(static_cast<size_t>(next.length));
  }
  return points;
}

// Sum of the matching blocks that SequenceMatcher finds: the longest common run first, then the
// same to its left and right. In texts of 200 code points and more, those that make up over 1 % of
// `b` start no run.
class BlockMatcher {
 public:
  BlockMatcher(const std::vector<char32_t>& a, const std::vector<char32_t>& b) : a_(a), b_(b) {
    for (size_t j = 0; j < b.size(); ++j) positions_[b[j]].push_back(static_cast<int>(j));
    constexpr size_t kPopularFrom = 200;
    if (b.size() < kPopularFrom) return;
    const size_t limit = b.size() / 100 + 1;
    std::erase_if(positions_, [&](const auto& entry) { return entry.second.size() > limit; });
  }

  int64_t Count() const {
    int64_t count = 0;
    std::vector<Range> ranges = {{0, static_cast<int>(a_.size()), 0, static_cast<int>(b_.size())}};
    while (!ranges.empty()) {
      const Range range = ranges.back();
      ranges.pop_back();
      const Run run = Longest(range);
      if (run.size == 0) continue;
      count += run.size;
      ranges.push_back({range.a_begin, run.a, range.b_begin, run.b});
      ranges.push_back({run.a + run.size, range.a_end, run.b + run.size, range.b_end});
    }
    return count;
  }

 private:
  struct Range {
    int a_begin, a_end, b_begin, b_end;
  };
  struct Run {
    int a = 0, b = 0, size = 0;
  };

  // The longest run; of equal ones that which begins first in a, then in b.
  Run Longest(const Range& range) const {
    Run best = {range.a_begin, range.b_begin, 0};
    std::unordered_map<int, int> ending, previous;  // by position in b: length of the run up to it
    for (int i = range.a_begin; i < range.a_end; ++i) {
      ending.clear();
      if (const auto found = positions_.find(a_[i]); found != positions_.end()) {
        for (const int j : found->second) {
          if (j < range.b_begin || j >= range.b_end) continue;
          const auto before = previous.find(j - 1);
          const int length = (before == previous.end() ? 0 : before->second) + 1;
          ending[j] = length;
          if (length > best.size) best = {i - length + 1, j - length + 1, length};
        }
      }
      ending.swap(previous);
    }
    while (best.a > range.a_begin && best.b > range.b_begin && a_[best.a - 1] == b_[best.b - 1]) {
      best = {best.a - 1, best.b - 1, best.size + 1};
    }
    while (best.a + best.size < range.a_end && best.b + best.size < range.b_end &&
           a_[best.a + best.size] == b_[best.b + best.size]) {
      ++best.size;
    }
    return best;
  }

  const std::vector<char32_t>& a_;
  const std::vector<char32_t>& b_;
  std::unordered_map<char32_t, std::vector<int>> positions_;  // in b, ascending
};

using Sentences = std::vector<std::vector<std::string>>;

// Text between full stops; a piece of white space alone is a sentence of one empty word.
Sentences SplitSentences(std::string_view text) {
  Sentences sentences;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('.', begin), text.size());
    if (end > begin) {
      sentences.push_back(Words(text.substr(begin, end - begin)));
      if (sentences.back().empty()) sentences.back().emplace_back();
    }
    begin = end + 1;
  }
  return sentences;
}

std::set<std::string> DistinctWords(const Sentences& sentences) {
  std::set<std::string> words;
  for (const auto& sentence : sentences) words.insert(sentence.begin(), sentence.end());
  return words;
}

// Adds the words of one longest common subsequence; where several exist, that which drops words
// from the end of `b` first.
void AddCommonSubsequence(const std::vector<std::string>& a, const std::vector<std::string>& b,
                          std::set<std::string>& words) {
  const size_t width = b.size() + 1;
  std::vector<int> lengths((a.size() + 1) * width, 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      lengths[i * width + j] =
          a[i - 1] == b[j - 1] ? lengths[(i - 1) * width + j - 1] + 1
                               : std::max(lengths[(i - 1) * width + j], lengths[i * width + j - 1]);
    }
  }
  size_t i = a.size(), j = b.size();
  while (i > 0 && j > 0) {
    if (a[i - 1] == b[j - 1]) {
      words.insert(a[i - 1]);
      --i;
      --j;
    } else if (lengths[(i - 1) * width + j] > lengths[i * width + j - 1]) {
      --i;
    } else {
      --j;
    }
  }
}

}  // namespace

std::string_view Trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(kSpaces);
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpaces) + 1 - begin);
}

std::string_view FirstLine(std::string_view text) {
  text = Trim(text);
  return Trim(text.substr(0, text.find('\n')));
}

double ContainedShare(std::string_view answer, std::span<const std::string> references) {
  if (references.empty()) return 0;
  const std::string lower = Lower(answer);
  const auto found = std::count_if(references.begin(), references.end(), [&](const auto& text) {
    return lower.find(Lower(text)) != lower.npos;
  });
  return static_cast<double>(found) / static_cast<double>(references.size());
}

double ContainsAny(std::string_view answer, std::span<const std::string> references) {
  return ContainedShare(answer, references) > 0 ? 1 : 0;
}

std::vector<std::string> NormalizedWords(std::string_view text) {
  std::string plain = Lower(text);
  std::erase_if(plain, [](char c) { return std::ispunct(static_cast<unsigned char>(c)) != 0; });
  std::vector<std::string> words = Words(plain);
  std::erase_if(words,
                [](const auto& word) { return word == "a" || word == "an" || word == "the"; });
  return words;
}

double TokenF1(std::string_view answer, std::string_view reference) {
  const auto answer_words = NormalizedWords(answer);
  const auto reference_words = NormalizedWords(reference);
  std::map<std::string, int> left;
  for (const std::string& word : reference_words) ++left[word];
  int common = 0;
  for (const std::string& word : answer_words) {
    const auto found = left.find(word);
    if (found != left.end() && found->second-- > 0) ++common;
  }
  if (common == 0) return 0;
  const double precision = common / static_cast<double>(answer_words.size());
  const double recall = common / static_cast<double>(reference_words.size());
  return 2 * precision * recall / (precision + recall);
}

double RougeL(std::string_view answer, std::string_view reference) {
  const Sentences answers = SplitSentences(answer);
  const Sentences references = SplitSentences(reference);
  if (answers.empty() || references.empty()) return 0;
  std::set<std::string> common;
  for (const auto& wanted : references) {
    for (const auto& given : answers) AddCommonSubsequence(wanted, given, common);
  }
  const auto num_common = static_cast<double>(common.size());
  const double precision = num_common / static_cast<double>(DistinctWords(answers).size());
  const double recall = num_common / static_cast<double>(DistinctWords(references).size());
  constexpr double kNoDivisionByZero = 1e-8;  // as published
  return 2 * precision * recall / (precision + recall + kNoDivisionByZero);
}

double EditSimilarity(std::string_view answer, std::string_view reference) {
  if (answer == reference) return 1;
  if (answer.empty() || reference.empty()) return 0;
  const auto a = CodePoints(answer);
  const auto b = CodePoints(reference);
  const auto total = static_cast<double>(a.size() + b.size());
  const auto matching = static_cast<double>(BlockMatcher(a, b).Count());
  return std::nearbyint(100 * (2 * matching / total)) / 100;  // half to even, as Python rounds
}

double CodeSimilarity(std::string_view answer, std::string_view reference) {
  answer.remove_prefix(std::min(answer.find_first_not_of('\n'), answer.size()));
  std::string_view chosen;
  while (!answer.empty()) {
    const size_t end = std::min(answer.find('\n'), answer.size());
    const std::string_view line = answer.substr(0, end);
    if (line.find_first_of("`#") == line.npos && line.find("//") == line.npos) {
      chosen = line;
      break;
    }
    answer.remove_prefix(std::min(end + 1, answer.size()));
  }
  return EditSimilarity(chosen, reference);
}

double RetrievalScore(std::string_view answer, std::string_view reference, std::string_view label) {
  const size_t at = reference.find(label);
  if (at == reference.npos) return 0;
  const auto wanted = Numbers(reference.substr(at + label.size()));
  return wanted.empty() ? 0 : ShareEqual(Numbers(answer), wanted.front());
}

double CountScore(std::string_view answer, std::string_view reference) {
  return ShareEqual(Numbers(answer), reference);
}

double ClassificationScore(std::string_view answer, std::string_view reference,
                           std::span<const std::string> classes) {
  int named = 0;
  bool found = false;
  for (const std::string& name : classes) {
    if (answer.find(name) == answer.npos) continue;
    if (name == reference) found = true;
    if (name == reference || reference.find(name) == reference.npos) ++named;
  }
  return found ? 1.0 / named : 0;
}

}  // namespace gloam
