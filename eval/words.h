// Words and sentences that the synthetic tasks are made of. Pure functions; any thread.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "eval/random.h"

namespace gloam {

std::span<const std::string_view> Adjectives();
std::span<const std::string_view> Nouns();

// Distinct names, "quiet-harbour"; of three parts once most pairs are used.
class NameMaker {
 public:
  explicit NameMaker(Random& random) : random_(random) {}
  std::string Next();

 private:
  Random& random_;
  std::vector<std::string> used_;  // sorted
};

// Distinct single words first, in a random order, then distinct pairs.
std::vector<std::string> DistinctWords(Random& random, int count);

// One sentence of made-up prose, with a full stop.
std::string ProseSentence(Random& random);

// The i-th sentence of a text that repeats itself.
std::string_view RepeatedSentence(int i);

std::string RandomDigits(Random& random, int count);  // the first is not 0
std::string RandomUuid(Random& random);               // 8-4-4-4-12 hexadecimal digits

}  // namespace gloam
