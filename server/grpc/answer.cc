// The answers' half of server/grpc/codec.h.

#include <algorithm>
#include <chrono>
#include <string_view>

#include "models/tokenizer/utf8.h"
#include "server/grpc/codec.h"
#include "server/token_text.h"

namespace gloam {
namespace {

v1::FinishReason ToWire(FinishReason reason) {
  // Answers that end otherwise are errors (StatusOfEnd) and never get here.
  return reason == FinishReason::kLength ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_STOP;
}

void ToWire(const RequestSummary& summary, v1::Usage* usage) {
  usage->set_prompt_tokens(summary.prompt_tokens);
  usage->set_completion_tokens(summary.completion_tokens);
  usage->set_total_tokens(summary.prompt_tokens + summary.completion_tokens);
  usage->mutable_prompt_tokens_details()->set_cached_tokens(summary.cached_tokens);
  if (!summary.sparsity) return;
  const SparsityUsage& sparsity = *summary.sparsity;
  v1::SparsityUsage* message = usage->mutable_sparsity();
  message->set_policy(std::string(PolicyLabel(sparsity)));
  message->set_mean_kept_tokens_per_head(sparsity.kept_tokens_per_head);
  message->set_mean_loaded_tokens_per_kv_head(sparsity.loaded_tokens_per_kv_head);
  message->set_mean_loaded_share(sparsity.loaded_share);
  message->set_sparse_steps(sparsity.sparse_steps);
  message->set_bypassed_steps(sparsity.bypassed_steps);
  if (sparsity.true_mass) message->set_true_mass(*sparsity.true_mass);
}

// Facts and helpers that both kinds of answers need.
class EncoderBase : public AnswerEncoder {
 protected:
  EncoderBase(const RunningGeneration& running, const Tokenizer& tokenizer, std::string model)
      : running_(running),
        prepared_(running.prepared()),
        tokenizer_(tokenizer),
        model_(std::move(model)),
        created_(std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count()) {}

  template <typename Message>
  void SetHeader(Message* message) const {
    message->set_id(prepared_.id);
    message->set_created(created_);
    message->set_model(model_);
  }

  // Completes a chunk of a stream: what every one has and, once, in the last where the client wants
  // it, the usage. Nothing where it would tell nothing.
  template <typename Chunk>
  std::optional<grpc::ByteBuffer> Finish(const RunningGeneration::Batch& batch, Chunk* chunk) {
    if (batch.done && prepared_.stream.include_usage && !usage_sent_) {
      usage_sent_ = true;
      gloam::ToWire(running_.summary(), chunk->mutable_usage());
    } else if (chunk->choices().empty()) {
      return std::nullopt;
    }
    SetHeader(chunk);
    return SerializeMessage(*chunk);
  }

  void ToWire(const TokenLogprob& logprob, v1::TokenLogprob* message) const {
    const std::string_view bytes = tokenizer_.TokenBytes(logprob.token, /*skip_special=*/false);
    message->set_token(TokenText(bytes));
    message->set_bytes(std::string(bytes));
    message->set_token_id(logprob.token);
    message->set_logprob(logprob.logprob);
    message->set_rank(logprob.rank);
  }

  template <typename TopLogprobs>
  void TopToWire(const SampleResult& result, int num_top, TopLogprobs* messages) const {
    const int count = std::min<int>(num_top, static_cast<int>(result.top.size()));
    for (int i = 0; i < count; ++i) ToWire(result.top[i], messages->Add());
  }

  // Nothing when the client did not ask (the engine may compute more for its own use).
  template <typename PromptLogprobs>
  void PromptToWire(const std::vector<SampleResult>& prompt, PromptLogprobs* messages) const {
    if (prepared_.num_prompt_logprobs < 0) return;
    for (const SampleResult& result : prompt) {
      v1::PromptLogprob* message = messages->Add();
      TokenLogprob token = result.logprob;
      token.token = result.token;
      ToWire(token, message->mutable_token());
      TopToWire(result, prepared_.num_prompt_logprobs, message->mutable_top_logprobs());
    }
  }

  const RunningGeneration& running_;
  const PreparedGeneration& prepared_;
  const Tokenizer& tokenizer_;
  const std::string model_;
  const int64_t created_;

 private:
  bool usage_sent_ = false;
};

class CompletionEncoder final : public EncoderBase {
 public:
  CompletionEncoder(const RunningGeneration& running, const Tokenizer& tokenizer, std::string model)
      : EncoderBase(running, tokenizer, std::move(model)),
        prompt_logprobs_(running.num_prompts()),
        streams_(static_cast<size_t>(running.num_prompts()) * running.answers_per_prompt()) {}

  grpc::ByteBuffer Whole(const std::vector<Answer>& answers,
                         const std::vector<std::vector<SampleResult>>& prompt_logprobs) override {
    v1::Completion message;
    SetHeader(&message);
    for (const Answer& answer : answers) {
      v1::CompletionChoice* choice = message.add_choices();
      choice->set_index(answer.index);
      Stream stream;
      const bool is_first = answer.index % prepared_.num_choices_per_prompt == 0;
      Begin(answer.prompt, is_first, prompt_logprobs[answer.prompt], &stream, choice);
      choice->mutable_text()->append(answer.text);
      AppendLogprobs(answer.logprobs, &stream, choice);
      choice->set_finish_reason(gloam::ToWire(answer.finish_reason));
      if (answer.stop_reason) choice->set_stop_reason(*answer.stop_reason);
    }
    gloam::ToWire(running_.summary(), message.mutable_usage());
    return SerializeMessage(message);
  }

  std::optional<grpc::ByteBuffer> Chunk(const RunningGeneration::Batch& batch) override {
    for (const auto& [prompt, logprobs] : batch.prompt_logprobs)
      prompt_logprobs_[prompt] = logprobs;
    v1::CompletionChunk message;
    for (const OutputDelta& delta : batch.deltas) {
      v1::CompletionChoice* choice = message.add_choices();
      choice->set_index(delta.index);
      Stream& stream = streams_[delta.index];
      if (!stream.begun) {
        const int prompt = delta.index / running_.answers_per_prompt();
        const bool is_first = delta.index % running_.answers_per_prompt() == 0;
        Begin(prompt, is_first, prompt_logprobs_[prompt], &stream, choice);
      }
      if (!prepared_.prompt_only) {
        choice->mutable_text()->append(delta.text);
        AppendLogprobs(delta.logprobs, &stream, choice);
        if (delta.stop_reason) choice->set_stop_reason(*delta.stop_reason);
      }
      if (delta.finish_reason) {
        choice->set_finish_reason(prepared_.prompt_only ? v1::FINISH_REASON_LENGTH
                                                        : gloam::ToWire(*delta.finish_reason));
      }
    }
    return Finish(batch, &message);
  }

 private:
  struct Stream {
    bool begun = false;
    int text_offset = 0;  // of the next token, in characters
  };

  // What stands before the first generated token.
  void Begin(int prompt, bool is_first, const std::vector<SampleResult>& prompt_logprobs,
             Stream* stream, v1::CompletionChoice* choice) const {
    stream->begun = true;
    if (is_first) PromptToWire(prompt_logprobs, choice->mutable_prompt_logprobs());
    if (prepared_.echo) {
      choice->set_text(ReplaceInvalidUtf8(prepared_.echo_texts[prompt]));
      AppendLogprobs(prompt_logprobs, stream, choice);
    }
  }

  void AppendLogprobs(const std::vector<SampleResult>& results, Stream* stream,
                      v1::CompletionChoice* choice) const {
    if (prepared_.num_logprobs < 0) return;
    v1::CompletionLogprobs* logprobs = choice->mutable_logprobs();
    const auto text_of = [&](int32_t token) {
      return CompletionTokenText(tokenizer_.TokenBytes(token, /*skip_special=*/false));
    };
    for (const SampleResult& result : results) {
      const std::string text = text_of(result.token);
      logprobs->add_token_logprobs(result.logprob.logprob);
      logprobs->add_text_offset(stream->text_offset);
      // Special tokens are not part of the text, so they take no room in it.
      stream->text_offset += static_cast<int>(
          CountCharacters(tokenizer_.TokenBytes(result.token, /*skip_special=*/true)));
      auto& top = *logprobs->add_top_logprobs()->mutable_logprobs();
      if (result.logprob.rank > 0) {
        const size_t count = std::min<size_t>(prepared_.num_logprobs, result.top.size());
        for (size_t i = 0; i < count; ++i) {
          top[text_of(result.top[i].token)] = result.top[i].logprob;
        }
        top[text] = result.logprob.logprob;  // always there, as in OpenAI's answers
      }
      logprobs->add_tokens(text);
    }
  }

  std::vector<std::vector<SampleResult>> prompt_logprobs_;  // [num_prompts], streams only
  std::vector<Stream> streams_;                             // one per answer
};

class ChatEncoder final : public EncoderBase {
 public:
  ChatEncoder(const RunningGeneration& running, const Tokenizer& tokenizer, std::string model)
      : EncoderBase(running, tokenizer, std::move(model)), begun_(running.answers_per_prompt()) {}

  grpc::ByteBuffer Whole(const std::vector<Answer>& answers,
                         const std::vector<std::vector<SampleResult>>& prompt_logprobs) override {
    v1::ChatCompletion message;
    SetHeader(&message);
    for (const Answer& answer : answers) {
      v1::ChatChoice* choice = message.add_choices();
      choice->set_index(answer.index);
      choice->mutable_message()->set_role("assistant");
      choice->mutable_message()->set_content(answer.text);
      AppendLogprobs(answer.logprobs, choice);
      choice->set_finish_reason(gloam::ToWire(answer.finish_reason));
      if (answer.stop_reason) choice->set_stop_reason(*answer.stop_reason);
    }
    PromptToWire(prompt_logprobs.front(), message.mutable_prompt_logprobs());
    gloam::ToWire(running_.summary(), message.mutable_usage());
    return SerializeMessage(message);
  }

  std::optional<grpc::ByteBuffer> Chunk(const RunningGeneration::Batch& batch) override {
    v1::ChatCompletionChunk message;
    for (const OutputDelta& delta : batch.deltas) {
      v1::ChatChunkChoice* choice = message.add_choices();
      choice->set_index(delta.index);
      if (!begun_[delta.index]) choice->mutable_delta()->set_role("assistant");
      begun_[delta.index] = true;
      choice->mutable_delta()->set_content(delta.text);
      AppendLogprobs(delta.logprobs, choice);
      if (delta.finish_reason) choice->set_finish_reason(gloam::ToWire(*delta.finish_reason));
      if (delta.stop_reason) choice->set_stop_reason(*delta.stop_reason);
    }
    return Finish(batch, &message);
  }

 private:
  template <typename Choice>
  void AppendLogprobs(const std::vector<SampleResult>& results, Choice* choice) const {
    if (prepared_.num_logprobs < 0) return;
    v1::ChatLogprobs* logprobs = choice->mutable_logprobs();
    for (const SampleResult& result : results) {
      v1::ChatTokenLogprob* message = logprobs->add_content();
      TokenLogprob token = result.logprob;
      token.token = result.token;
      ToWire(token, message->mutable_token());
      TopToWire(result, prepared_.num_logprobs, message->mutable_top_logprobs());
    }
  }

  std::vector<bool> begun_;  // one per choice: its role was sent
};

}  // namespace

std::unique_ptr<AnswerEncoder> MakeCompletionEncoder(const RunningGeneration& running,
                                                     const Tokenizer& tokenizer,
                                                     const std::string& model) {
  return std::make_unique<CompletionEncoder>(running, tokenizer, model);
}

std::unique_ptr<AnswerEncoder> MakeChatEncoder(const RunningGeneration& running,
                                               const Tokenizer& tokenizer,
                                               const std::string& model) {
  return std::make_unique<ChatEncoder>(running, tokenizer, model);
}

}  // namespace gloam
