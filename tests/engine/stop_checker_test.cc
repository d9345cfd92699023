#include "engine/stop_checker.h"

#include <random>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

struct Outcome {
  std::vector<std::string> released;  // after each piece
  std::string text;
  std::optional<int> found;
};

Outcome FeedAll(const std::vector<std::string>& stops, const std::vector<std::string>& pieces,
                bool include_stop = false) {
  StopStringMatcher matcher(stops);
  Outcome outcome;
  for (const std::string& piece : pieces) {
    std::string released;
    outcome.found = matcher.Feed(piece, include_stop, &released);
    outcome.released.push_back(released);
    outcome.text += released;
    if (outcome.found) return outcome;
  }
  outcome.text += matcher.TakeHeld();
  return outcome;
}

TEST_CASE("a stop string over token borders is held back and cut") {
  const Outcome outcome = FeedAll({"<end>"}, {"ab<", "en", "d> tail"});
  CHECK(outcome.released == std::vector<std::string>{"ab", "", ""});
  CHECK(outcome.found == 0);
}

TEST_CASE("what turns out not to be a stop string is released, up to the next candidate") {
  const Outcome outcome = FeedAll({"aab"}, {"a", "a", "a", "c"});
  CHECK(outcome.released == std::vector<std::string>{"", "", "a", "aac"});
  CHECK_FALSE(outcome.found);
}

TEST_CASE("the stop string that ends first wins; at the same byte, the longest") {
  CHECK(FeedAll({"xyz", "y"}, {"axyz"}).text == "ax");
  const Outcome outcome = FeedAll({"z", "yz"}, {"axyz"});
  CHECK(outcome.text == "ax");
  CHECK(outcome.found == 1);
}

TEST_CASE("the stop string may be part of the answer; what follows never is") {
  CHECK(FeedAll({"end"}, {"an e", "nd", "x"}, true).text == "an end");
  CHECK(FeedAll({"e"}, {"an exit"}, true).text == "an e");
}

TEST_CASE("held text goes out when the answer ends otherwise") {
  CHECK(FeedAll({"stop"}, {"a sto"}).text == "a sto");
}

TEST_CASE("random texts: as a search over the whole text finds it, and nothing leaks early") {
  int num_found = 0;
  for (uint32_t seed = 1; seed <= 3000; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto text_of = [&random](int length) {
      std::string text;
      for (int i = 0; i < length; ++i) text.push_back(static_cast<char>('a' + random() % 2));
      return text;
    };
    std::vector<std::string> stops;
    for (uint32_t i = 0, n = 1 + random() % 4; i < n; ++i) {
      stops.push_back(text_of(3 + static_cast<int>(random() % 5)));
    }
    const std::string text = text_of(static_cast<int>(random() % 40));
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random() % 4;
      pieces.push_back(text.substr(at, length));
      at += length;
    }

    size_t end = text.size() + 1;  // where the first match ends
    size_t begin = text.size();
    for (const std::string& stop : stops) {
      const size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      const size_t stop_end = at + stop.size();
      if (stop_end < end || (stop_end == end && at < begin)) {
        end = stop_end;
        begin = at;
      }
    }
    const Outcome outcome = FeedAll(stops, pieces);
    CHECK(outcome.found.has_value() == (end <= text.size()));
    CHECK(outcome.text == text.substr(0, begin));
    num_found += outcome.found.has_value();
  }
  CHECK(num_found > 500);
  CHECK(num_found < 2900);
}

TEST_CASE("end of sequence, stop tokens and lengths") {
  const std::vector<int32_t> eos = {0};
  SamplingParams params;
  params.stop_token_ids = {5};
  params.min_tokens = 2;
  StopChecker checker(params, eos, 4);
  CHECK(std::vector<int32_t>(checker.BannedTokens(1).begin(), checker.BannedTokens(1).end()) ==
        std::vector<int32_t>{5, 0});
  CHECK(checker.BannedTokens(2).empty());
  CHECK_FALSE(checker.CheckToken(0, 2).finish_reason);
  CHECK(checker.CheckToken(0, 3).finish_reason == FinishReason::kStop);
  CHECK_FALSE(checker.CheckToken(0, 3).stop_reason);
  CHECK_FALSE(checker.CheckToken(0, 3).has_text);
  CHECK(checker.CheckToken(5, 4).stop_reason == "5");
  CHECK(checker.CheckToken(7, 4).finish_reason == FinishReason::kLength);
  CHECK(checker.CheckToken(7, 4).has_text);

  params.ignore_eos = true;
  params.include_stop_str_in_output = true;
  StopChecker ignoring(params, eos, 4);
  CHECK_FALSE(ignoring.CheckToken(0, 3).finish_reason);
  CHECK(ignoring.BannedTokens(0).size() == 1);
  CHECK(ignoring.CheckToken(5, 3).has_text);
}

TEST_CASE("stop strings count only after min_tokens") {
  SamplingParams params;
  params.stop = {"ab"};
  params.min_tokens = 2;
  StopChecker checker(params, {}, 100);
  CHECK(checker.CheckText("ab", 1, false).text == "ab");
  CHECK(checker.CheckText("a", 2, false).text == "a");
  CHECK_FALSE(checker.CheckText("b", 3, false).stop_string);
  CHECK(checker.CheckText("ab", 4, false).stop_string == "ab");
}

}  // namespace
}  // namespace gloam
