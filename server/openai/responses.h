// Answers and errors -> OpenAI's JSON bodies. Pure functions of their arguments.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "models/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"
#include "server/running_generation.h"

namespace gloam {

// What every answer to one request repeats.
struct ResponseInfo {
  std::string id;
  int64_t created = 0;  // seconds since the epoch
  std::string model;
  std::string system_fingerprint;
  bool is_chat = false;
  std::vector<std::string> stop;  // the request's stop strings
};

// {"error": {"message", "type", "param", "code"}}; null where there is no param or code.
std::string ErrorBody(const Status& status);

std::string CompletionBody(const ResponseInfo& info, const RunningGeneration& running,
                           const std::vector<Answer>& answers,
                           const std::vector<std::vector<SampleResult>>& prompt_logprobs,
                           const Tokenizer& tokenizer);
std::string ChatCompletionBody(const ResponseInfo& info, const RunningGeneration& running,
                               const std::vector<Answer>& answers,
                               const std::vector<std::vector<SampleResult>>& prompt_logprobs,
                               const Tokenizer& tokenizer);

nlohmann::json UsageJson(const RequestSummary& summary);
std::string_view FinishReasonName(FinishReason reason);  // "stop" or "length"

// vLLM's `stop_reason`: the stop string, the stop token's id as a number, or null.
nlohmann::json StopReasonJson(const std::optional<std::string>& stop_reason,
                              const std::vector<std::string>& stop_strings);

// Chat's shape: {"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}.
nlohmann::json ChatLogprobsJson(const std::vector<SampleResult>& logprobs, int num_logprobs,
                                const Tokenizer& tokenizer);

// Completions' shape: parallel arrays. It remembers where the next token's text starts, so that a
// stream's chunks continue one another.
class CompletionLogprobs {
 public:
  CompletionLogprobs(const Tokenizer& tokenizer, int num_logprobs)
      : tokenizer_(&tokenizer), num_logprobs_(num_logprobs) {}

  // {tokens, token_logprobs, top_logprobs, text_offset}. Entries with rank 0 (a prompt's first
  // token) have null values.
  nlohmann::json Next(const std::vector<SampleResult>& logprobs);

 private:
  const Tokenizer* tokenizer_;
  int num_logprobs_;
  int64_t offset_ = 0;  // in characters of the choice's text
};

// vLLM's prompt_logprobs: [null, {"<id>": {logprob, rank, decoded_token}, ...}, ...].
nlohmann::json PromptLogprobsJson(const std::vector<SampleResult>& logprobs, int num_logprobs,
                                  const Tokenizer& tokenizer);

}  // namespace gloam
