#include "server/openai/stream.h"

#include <utility>

#include "server/strict_json.h"

namespace gloam {

using nlohmann::json;

OpenAiStream::OpenAiStream(ResponseInfo info, const RunningGeneration& running,
                           const Tokenizer& tokenizer)
    : info_(std::move(info)),
      running_(running),
      tokenizer_(tokenizer),
      prompt_logprobs_(running.num_prompts()) {
  const json object = info_.is_chat ? "chat.completion.chunk" : "text_completion";
  head_ = "data: {\"id\":" + DumpJson(info_.id) + ",\"object\":" + DumpJson(object) +
          ",\"created\":" + std::to_string(info_.created) + ",\"model\":" + DumpJson(info_.model) +
          ",\"system_fingerprint\":" + DumpJson(info_.system_fingerprint) + ",\"choices\":[";
  tail_ = running.prepared().stream.include_usage ? "],\"usage\":null}\n\n" : "]}\n\n";
  const int num_choices = running.num_prompts() * running.answers_per_prompt();
  choices_.assign(num_choices,
                  {false, CompletionLogprobs(tokenizer, running.prepared().num_logprobs)});
}

Status OpenAiStream::Append(RunningGeneration::Batch batch, std::string* out) {
  for (auto& [prompt, logprobs] : batch.prompt_logprobs) {
    prompt_logprobs_[prompt] = std::move(logprobs);
  }
  for (OutputDelta& delta : batch.deltas) {
    GLOAM_RETURN_IF_ERROR(StatusOfEnd(delta));
    if (running_.prepared().prompt_only) {
      if (!delta.finish_reason) continue;
      delta.text.clear();
      delta.logprobs.clear();
      delta.stop_reason.reset();
      delta.finish_reason = FinishReason::kLength;
    }
    AppendDelta(delta, out);
  }
  if (!batch.done) return OkStatus();
  if (running_.prepared().stream.include_usage) {
    *out += head_;
    *out += "],\"usage\":";
    *out += DumpJson(UsageJson(running_.summary()));
    *out += "}\n\n";
  }
  *out += "data: [DONE]\n\n";
  return OkStatus();
}

void OpenAiStream::AppendDelta(const OutputDelta& delta, std::string* out) {
  const bool wants_logprobs = running_.prepared().num_logprobs >= 0;
  Choice& choice = choices_[delta.index];
  if (!choice.started) {
    choice.started = true;
    AppendStart(delta.index, out);
  }
  const bool has_logprobs = wants_logprobs && !delta.logprobs.empty();
  if (delta.text.empty() && !delta.finish_reason && !has_logprobs) return;  // text is held back
  json logprobs;
  if (has_logprobs) {
    logprobs = info_.is_chat
                   ? ChatLogprobsJson(delta.logprobs, running_.prepared().num_logprobs, tokenizer_)
                   : choice.logprobs.Next(delta.logprobs);
  }
  AppendChunk(delta.index, delta.text, logprobs, delta.finish_reason ? &delta : nullptr, out);
}

// What leads a choice: the role in a chat, the echoed prompt in a completion.
void OpenAiStream::AppendStart(int index, std::string* out) {
  if (info_.is_chat) {
    *out += head_;
    *out += "{\"index\":" + std::to_string(index) +
            ",\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},"
            "\"logprobs\":null,\"finish_reason\":null}";
    *out += tail_;
    return;
  }
  const PreparedGeneration& prepared = running_.prepared();
  if (!prepared.echo) return;
  const int prompt = index / running_.answers_per_prompt();
  json logprobs;
  if (prepared.num_logprobs >= 0) {
    logprobs = choices_[index].logprobs.Next(prompt_logprobs_[prompt]);
  }
  AppendChunk(index, prepared.echo_texts[prompt], logprobs, nullptr, out);
}

// `last`: the delta that ends the choice, or null.
void OpenAiStream::AppendChunk(int index, std::string_view content, const json& logprobs,
                               const OutputDelta* last, std::string* out) {
  *out += head_;
  *out += "{\"index\":";
  *out += std::to_string(index);
  if (!info_.is_chat) {
    *out += ",\"text\":";
    AppendJsonString(content, out);
  } else if (content.empty()) {
    *out += ",\"delta\":{}";
  } else {
    *out += ",\"delta\":{\"content\":";
    AppendJsonString(content, out);
    *out += '}';
  }
  if (logprobs.is_null()) {
    *out += ",\"logprobs\":null";
  } else {
    *out += ",\"logprobs\":";
    *out += DumpJson(logprobs);
  }
  if (last == nullptr) {
    *out += ",\"finish_reason\":null}";
  } else {
    *out += ",\"finish_reason\":\"";
    *out += FinishReasonName(*last->finish_reason);
    *out += "\",\"stop_reason\":";
    *out += DumpJson(StopReasonJson(last->stop_reason, info_.stop));
    *out += '}';
  }
  *out += tail_;
}

std::string OpenAiStream::ErrorEvent(const Status& status) {
  return "data: " + ErrorBody(status) + "\n\n";
}

}  // namespace gloam
