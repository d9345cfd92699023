// Haystack: filler sentences with needles among them. A pure function of its arguments.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "eval/random.h"

namespace gloam {

struct Needle {
  double depth = 0;  // share of the filler's sentences that come before it
  std::string text;
};

// Filler of real sentences, wrapped around, or of made-up prose where there are none.
class ProseFiller {
 public:
  ProseFiller(const std::vector<std::string>& sentences, uint64_t seed, std::string_view name);
  std::string Next();

 private:
  const std::vector<std::string>& sentences_;
  Random random_;
  size_t next_ = 0;
};

// `num_sentences` calls of `filler`, and the needles at their depths; equal depths keep the order.
template <typename Filler>
std::string BuildHaystack(int num_sentences, const std::vector<Needle>& needles, Filler filler) {
  std::string text;
  const auto add = [&text](std::string_view sentence) {
    if (!text.empty()) text += ' ';
    text += sentence;
  };
  std::vector<const Needle*> waiting;
  for (const Needle& needle : needles) waiting.push_back(&needle);
  for (int i = 0; i <= num_sentences; ++i) {
    std::erase_if(waiting, [&](const Needle* needle) {
      const bool due = static_cast<int>(needle->depth * num_sentences + 0.5) <= i;
      if (due) add(needle->text);
      return due;
    });
    if (i < num_sentences) add(filler());
  }
  return text;
}

// `count` depths in (0, 1), ascending.
std::vector<double> RandomDepths(Random& random, int count);

}  // namespace gloam
