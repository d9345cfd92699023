#include "eval/tasks/haystack.h"

#include <algorithm>

#include "eval/tasks/tasks.h"
#include "eval/words.h"

namespace gloam {

ProseFiller::ProseFiller(const std::vector<std::string>& sentences, uint64_t seed,
                         std::string_view name)
    : sentences_(sentences), random_(seed, name) {
  if (!sentences_.empty()) {
    next_ = static_cast<size_t>(random_.Below(static_cast<int64_t>(sentences_.size())));
  }
}

std::string ProseFiller::Next() {
  if (sentences_.empty()) return ProseSentence(random_);
  return sentences_[next_++ % sentences_.size()];
}

std::vector<double> RandomDepths(Random& random, int count) {
  std::vector<double> depths;
  for (int i = 0; i < count; ++i) depths.push_back(random.Unit());
  std::sort(depths.begin(), depths.end());
  return depths;
}

std::vector<std::string> SplitIntoSentences(std::string_view text) {
  std::vector<std::string> sentences;
  std::string sentence;
  const auto end_sentence = [&] {
    if (!sentence.empty()) sentences.push_back(std::move(sentence));
    sentence.clear();
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const bool space = text[i] == ' ' || text[i] == '\n' || text[i] == '\r' || text[i] == '\t';
    if (!space) {
      sentence += text[i];
      continue;
    }
    if (sentence.empty() || sentence.back() == ' ') continue;
    const char last = sentence.back();
    if (last == '.' || last == '!' || last == '?') {
      end_sentence();
    } else {
      sentence += ' ';
    }
  }
  if (!sentence.empty() && sentence.back() == ' ') sentence.pop_back();
  end_sentence();
  return sentences;
}

}  // namespace gloam
