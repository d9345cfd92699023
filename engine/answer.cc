#include "engine/answer.h"

#include <algorithm>

#include "base/check.h"

namespace gloam {
namespace {

constexpr int32_t kUnknownToken = -1;  // in the place of one that is being drawn

}  // namespace

Answer::Answer(const Request& request, SequenceOrder order, uint64_t seed, int max_new_tokens,
               const Tokenizer& tokenizer)
    : request_(request),
      tokenizer_(tokenizer),
      seed_(seed),
      max_new_tokens_(max_new_tokens),
      stop_checker_(request.sampling, tokenizer.eos_ids(), max_new_tokens),
      detokenizer_(tokenizer, request.sampling.skip_special_tokens),
      counts_output_(request.sampling.repetition_penalty != 1.0f ||
                     request.sampling.frequency_penalty != 0.0f ||
                     request.sampling.presence_penalty != 0.0f) {
  sequence_.order = order;
  sequence_.answer = this;
  sequence_.tokens = request.prompt;
  sequence_.num_prompt_tokens = static_cast<int>(request.prompt.size());
  // All answers share the prompt, so the first scores it for all.
  sequence_.wants_prompt_scores = request.sampling.num_prompt_logprobs >= 0 && order.index == 0;
  delta_.index = order.index;
  if (request.sampling.repetition_penalty != 1.0f) {
    distinct_prompt_tokens_ = request.prompt;
    std::sort(distinct_prompt_tokens_.begin(), distinct_prompt_tokens_.end());
    distinct_prompt_tokens_.erase(
        std::unique(distinct_prompt_tokens_.begin(), distinct_prompt_tokens_.end()),
        distinct_prompt_tokens_.end());
  }
}

SampleRow Answer::MakeSampleRow() const {
  const SamplingParams& params = request_.sampling;
  SampleRow row;
  row.temperature = params.temperature;
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  row.top_k = params.top_k;
  row.repetition_penalty = params.repetition_penalty;
  row.frequency_penalty = params.frequency_penalty;
  row.presence_penalty = params.presence_penalty;
  row.prompt_tokens = distinct_prompt_tokens_;
  row.output_counts = output_counts_;
  row.logit_bias = params.logit_bias;
  row.banned_tokens = stop_checker_.BannedTokens(num_generated());
  row.seed = seed_;
  row.draw_index = static_cast<uint64_t>(num_generated());
  row.num_logprobs = params.num_logprobs;
  return row;
}

void Answer::Expect(int row) {
  GLOAM_CHECK(!finished_ && sequence_.drawn_in_row < 0 && row >= 0);
  sequence_.tokens.push_back(kUnknownToken);
  sequence_.drawn_in_row = row;
}

void Answer::Take(SampleResult result) {
  GLOAM_CHECK(!finished_ && !taken_ && sequence_.drawn_in_row >= 0);
  const int32_t token = result.token;
  sequence_.tokens.back() = token;
  sequence_.drawn_in_row = -1;
  if (counts_output_) CountToken(token);
  taken_ = {.result = std::move(result),
            .num_generated = num_generated(),
            .verdict = stop_checker_.CheckToken(token, num_generated())};
}

void Answer::Deliver() {
  GLOAM_CHECK(!finished_ && taken_);
  const int32_t token = taken_->result.token;
  StopChecker::TokenVerdict& token_verdict = taken_->verdict;
  delta_.tokens.push_back(token);
  if (request_.sampling.num_logprobs >= 0) delta_.logprobs.push_back(std::move(taken_->result));

  const bool is_last = token_verdict.finish_reason.has_value();
  std::string text;
  // A model's output may be padded beyond its vocabulary; such a token stands for no text.
  if (token_verdict.has_text && token < tokenizer_.vocab_size()) text = detokenizer_.Append(token);
  if (is_last) text += detokenizer_.Flush();

  StopChecker::TextVerdict text_verdict =
      stop_checker_.CheckText(text, taken_->num_generated, is_last);
  delta_.text += text_verdict.text;
  if (text_verdict.stop_string) {
    delta_.stop_reason = std::move(text_verdict.stop_string);
    Finish(FinishReason::kStop);
  } else if (is_last) {
    delta_.stop_reason = std::move(token_verdict.stop_reason);
    Finish(*token_verdict.finish_reason);
  }
  taken_.reset();
}

void Answer::Finish(FinishReason reason, Status error) {
  GLOAM_CHECK(!finished_);
  finished_ = true;
  finish_reason_ = reason;
  delta_.finish_reason = reason;
  delta_.error = std::move(error);
}

OutputDelta Answer::TakeDelta() {
  delta_taken_ = finished_;
  OutputDelta delta = std::move(delta_);
  delta_ = {};
  delta_.index = sequence_.order.index;
  return delta;
}

void Answer::CountToken(int32_t token) {
  const auto [it, inserted] = count_of_token_.try_emplace(token, output_counts_.size());
  if (inserted) output_counts_.emplace_back(token, 0);
  ++output_counts_[it->second].second;
}

}  // namespace gloam
