#include "server/openai/responses.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "server/api_error.h"
#include "server/strict_json.h"
#include "server/token_text.h"

namespace gloam {
namespace {

using nlohmann::json;

// JSON has no minus infinity; OpenAI and vLLM write this for "impossible".
constexpr float kMinLogprob = -9999.0f;

json LogprobJson(float logprob) { return std::isfinite(logprob) ? logprob : kMinLogprob; }

json ChatTokenJson(const TokenLogprob& entry, const Tokenizer& tokenizer) {
  const std::string_view bytes = tokenizer.TokenBytes(entry.token, /*skip_special=*/false);
  json byte_values = json::array();
  for (const unsigned char c : bytes) byte_values.push_back(c);
  return {{"token", TokenText(bytes)},
          {"logprob", LogprobJson(entry.logprob)},
          {"bytes", std::move(byte_values)}};
}

// How many of `top` the client asked for; the engine may have computed more.
size_t NumTop(const SampleResult& result, int num_logprobs) {
  return std::min(result.top.size(), static_cast<size_t>(std::max(0, num_logprobs)));
}

json Envelope(const ResponseInfo& info, const char* object) {
  return {{"id", info.id},
          {"object", object},
          {"created", info.created},
          {"model", info.model},
          {"system_fingerprint", info.system_fingerprint}};
}

std::vector<SampleResult> EchoedLogprobs(const std::vector<SampleResult>& prompt,
                                         const std::vector<SampleResult>& answer) {
  std::vector<SampleResult> all = prompt;
  all.insert(all.end(), answer.begin(), answer.end());
  return all;
}

json SparsityJson(const SparsityUsage& usage) {
  return {{"policy", PolicyLabel(usage)},
          {"mean_kept_tokens_per_head", usage.kept_tokens_per_head},
          {"mean_loaded_tokens_per_kv_head", usage.loaded_tokens_per_kv_head},
          {"mean_loaded_share", usage.loaded_share},
          {"sparse_steps", usage.sparse_steps},
          {"bypassed_steps", usage.bypassed_steps},
          {"true_mass", usage.true_mass ? json(*usage.true_mass) : json(nullptr)}};
}

}  // namespace

std::string ErrorBody(const Status& status) {
  const auto or_null = [](std::string text) { return text.empty() ? json(nullptr) : json(text); };
  return DumpJson({{"error",
                    {{"message", MessageOf(status)},
                     {"type", ErrorTypeOf(status)},
                     {"param", or_null(ParamOf(status))},
                     {"code", or_null(ErrorCodeOf(status))}}}});
}

std::string_view FinishReasonName(FinishReason reason) {
  return reason == FinishReason::kLength ? "length" : "stop";
}

json StopReasonJson(const std::optional<std::string>& stop_reason,
                    const std::vector<std::string>& stop_strings) {
  if (!stop_reason) return nullptr;
  const std::string& text = *stop_reason;
  if (std::find(stop_strings.begin(), stop_strings.end(), text) == stop_strings.end()) {
    int64_t id = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
    if (error == std::errc() && end == text.data() + text.size()) return id;
  }
  return text;
}

json UsageJson(const RequestSummary& summary) {
  json usage = {{"prompt_tokens", summary.prompt_tokens},
                {"completion_tokens", summary.completion_tokens},
                {"total_tokens", summary.prompt_tokens + summary.completion_tokens},
                {"prompt_tokens_details", {{"cached_tokens", summary.cached_tokens}}}};
  if (summary.sparsity) usage["sparsity"] = SparsityJson(*summary.sparsity);
  return usage;
}

json ChatLogprobsJson(const std::vector<SampleResult>& logprobs, int num_logprobs,
                      const Tokenizer& tokenizer) {
  json content = json::array();
  for (const SampleResult& result : logprobs) {
    TokenLogprob drawn = result.logprob;
    drawn.token = result.token;
    json entry = ChatTokenJson(drawn, tokenizer);
    json top = json::array();
    for (size_t i = 0; i < NumTop(result, num_logprobs); ++i) {
      top.push_back(ChatTokenJson(result.top[i], tokenizer));
    }
    entry["top_logprobs"] = std::move(top);
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

json CompletionLogprobs::Next(const std::vector<SampleResult>& logprobs) {
  json tokens = json::array(), values = json::array(), tops = json::array(),
       offsets = json::array();
  const auto text_of = [&](int32_t token) {
    return CompletionTokenText(tokenizer_->TokenBytes(token, /*skip_special=*/false));
  };
  for (const SampleResult& result : logprobs) {
    tokens.push_back(text_of(result.token));
    offsets.push_back(offset_);
    // Special tokens are not part of the text, so they take no room in it.
    offset_ += CountCharacters(tokenizer_->TokenBytes(result.token, /*skip_special=*/true));
    if (result.logprob.rank == 0) {
      values.push_back(nullptr);
      tops.push_back(nullptr);
      continue;
    }
    values.push_back(LogprobJson(result.logprob.logprob));
    json top = json::object();
    for (size_t i = 0; i < NumTop(result, num_logprobs_); ++i) {
      top[text_of(result.top[i].token)] = LogprobJson(result.top[i].logprob);
    }
    top[text_of(result.token)] = LogprobJson(result.logprob.logprob);  // always there, as in vLLM
    tops.push_back(std::move(top));
  }
  return {{"tokens", std::move(tokens)},
          {"token_logprobs", std::move(values)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

json PromptLogprobsJson(const std::vector<SampleResult>& logprobs, int num_logprobs,
                        const Tokenizer& tokenizer) {
  json out = json::array();
  for (const SampleResult& result : logprobs) {
    if (result.logprob.rank == 0) {
      out.push_back(nullptr);
      continue;
    }
    json entry = json::object();
    const auto add = [&](int32_t token, const TokenLogprob& value) {
      entry[std::to_string(token)] = {
          {"logprob", LogprobJson(value.logprob)},
          {"rank", value.rank},
          {"decoded_token", TokenText(tokenizer.TokenBytes(token, /*skip_special=*/false))}};
    };
    for (size_t i = 0; i < NumTop(result, num_logprobs); ++i) {
      add(result.top[i].token, result.top[i]);
    }
    add(result.token, result.logprob);
    out.push_back(std::move(entry));
  }
  return out;
}

std::string CompletionBody(const ResponseInfo& info, const RunningGeneration& running,
                           const std::vector<Answer>& answers,
                           const std::vector<std::vector<SampleResult>>& prompt_logprobs,
                           const Tokenizer& tokenizer) {
  const PreparedGeneration& prepared = running.prepared();
  json choices = json::array();
  for (const Answer& answer : answers) {
    const std::vector<SampleResult>& of_prompt = prompt_logprobs[answer.prompt];
    json logprobs;
    if (prepared.num_logprobs >= 0) {
      CompletionLogprobs writer(tokenizer, prepared.num_logprobs);
      logprobs =
          writer.Next(prepared.echo ? EchoedLogprobs(of_prompt, answer.logprobs) : answer.logprobs);
    }
    json choice = {
        {"index", answer.index},
        {"text", prepared.echo ? prepared.echo_texts[answer.prompt] + answer.text : answer.text},
        {"logprobs", std::move(logprobs)},
        {"finish_reason", FinishReasonName(answer.finish_reason)},
        {"stop_reason", StopReasonJson(answer.stop_reason, info.stop)}};
    if (prepared.num_prompt_logprobs >= 0) {
      choice["prompt_logprobs"] =
          PromptLogprobsJson(of_prompt, prepared.num_prompt_logprobs, tokenizer);
    }
    choices.push_back(std::move(choice));
  }
  json body = Envelope(info, "text_completion");
  body["choices"] = std::move(choices);
  body["usage"] = UsageJson(running.summary());
  return DumpJson(body);
}

std::string ChatCompletionBody(const ResponseInfo& info, const RunningGeneration& running,
                               const std::vector<Answer>& answers,
                               const std::vector<std::vector<SampleResult>>& prompt_logprobs,
                               const Tokenizer& tokenizer) {
  const PreparedGeneration& prepared = running.prepared();
  json choices = json::array();
  for (const Answer& answer : answers) {
    json logprobs;
    if (prepared.num_logprobs >= 0) {
      logprobs = ChatLogprobsJson(answer.logprobs, prepared.num_logprobs, tokenizer);
    }
    choices.push_back(
        {{"index", answer.index},
         {"message", {{"role", "assistant"}, {"content", answer.text}, {"refusal", nullptr}}},
         {"logprobs", std::move(logprobs)},
         {"finish_reason", FinishReasonName(answer.finish_reason)},
         {"stop_reason", StopReasonJson(answer.stop_reason, info.stop)}});
  }
  json body = Envelope(info, "chat.completion");
  body["choices"] = std::move(choices);
  body["usage"] = UsageJson(running.summary());
  if (prepared.num_prompt_logprobs >= 0) {
    body["prompt_logprobs"] =
        PromptLogprobsJson(prompt_logprobs.front(), prepared.num_prompt_logprobs, tokenizer);
  }
  return DumpJson(body);
}

}  // namespace gloam
