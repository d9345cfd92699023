#include "engine/stop_checker.h"

#include <algorithm>
#include <utility>

namespace gloam {

StopStringMatcher::StopStringMatcher(const std::vector<std::string>& strings) {
  for (const std::string& text : strings) {
    Pattern pattern{.text = text, .border = std::vector<int>(text.size(), 0)};
    for (size_t i = 1; i < text.size(); ++i) {
      int length = pattern.border[i - 1];
      while (length > 0 && text[i] != text[length]) length = pattern.border[length - 1];
      pattern.border[i] = text[i] == text[length] ? length + 1 : 0;
    }
    patterns_.push_back(std::move(pattern));
  }
}

int StopStringMatcher::Advance(Pattern& pattern, char byte) {
  int& n = pattern.num_matched;
  while (n > 0 && pattern.text[n] != byte) n = pattern.border[n - 1];
  if (pattern.text[n] == byte) ++n;
  return n;
}

std::optional<int> StopStringMatcher::Feed(std::string_view text, bool include_stop,
                                           std::string* released) {
  for (size_t i = 0; i < text.size(); ++i) {
    held_.push_back(text[i]);
    int found = -1;
    for (size_t p = 0; p < patterns_.size(); ++p) {
      const size_t length = patterns_[p].text.size();
      if (Advance(patterns_[p], text[i]) < static_cast<int>(length)) continue;
      if (found < 0 || length > patterns_[found].text.size()) found = static_cast<int>(p);
    }
    if (found >= 0) {
      if (!include_stop) held_.resize(held_.size() - patterns_[found].text.size());
      released->append(TakeHeld());
      return found;
    }
  }
  int num_held = 0;
  for (const Pattern& pattern : patterns_) num_held = std::max(num_held, pattern.num_matched);
  const size_t cut = held_.size() - num_held;
  released->append(held_, 0, cut);
  held_.erase(0, cut);
  return std::nullopt;
}

std::string StopStringMatcher::TakeHeld() { return std::exchange(held_, {}); }

StopChecker::StopChecker(const SamplingParams& params, std::span<const int32_t> eos_ids,
                         int max_new_tokens)
    : stop_strings_(params.stop),
      stop_token_ids_(params.stop_token_ids),
      ending_tokens_(params.stop_token_ids),
      eos_ids_(eos_ids),
      ignore_eos_(params.ignore_eos),
      include_stop_(params.include_stop_str_in_output),
      min_tokens_(params.min_tokens),
      max_new_tokens_(max_new_tokens),
      matcher_(params.stop) {
  if (!ignore_eos_) ending_tokens_.insert(ending_tokens_.end(), eos_ids.begin(), eos_ids.end());
}

bool StopChecker::IsEos(int32_t token) const {
  return !ignore_eos_ && std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end();
}

std::span<const int32_t> StopChecker::BannedTokens(int num_generated) const {
  if (num_generated >= min_tokens_) return {};
  return ending_tokens_;
}

StopChecker::TokenVerdict StopChecker::CheckToken(int32_t token, int num_generated) const {
  TokenVerdict verdict;
  if (num_generated > min_tokens_) {
    if (IsEos(token)) {
      verdict.finish_reason = FinishReason::kStop;
    } else if (std::find(stop_token_ids_.begin(), stop_token_ids_.end(), token) !=
               stop_token_ids_.end()) {
      verdict.finish_reason = FinishReason::kStop;
      verdict.stop_reason = std::to_string(token);
    }
    if (verdict.finish_reason) {
      verdict.has_text = include_stop_;
      return verdict;
    }
  }
  if (num_generated >= max_new_tokens_) verdict.finish_reason = FinishReason::kLength;
  return verdict;
}

StopChecker::TextVerdict StopChecker::CheckText(std::string_view text, int num_generated,
                                                bool is_last) {
  TextVerdict verdict;
  if (num_generated <= min_tokens_) {  // text of the first min_tokens cannot stop the answer
    verdict.text = std::string(text);
    return verdict;
  }
  if (const auto found = matcher_.Feed(text, include_stop_, &verdict.text)) {
    verdict.stop_string = stop_strings_[*found];
  } else if (is_last) {
    verdict.text += matcher_.TakeHeld();
  }
  return verdict;
}

}  // namespace gloam
