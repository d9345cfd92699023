// GenerationService: what both front ends call. It validates an API request against the model's
// limits, applies defaults and the chat template, tokenises, and submits to the engine.
// Immutable after construction, except for its own request counters; any thread.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/chat_template.h"
#include "engine/engine.h"
#include "server/api.h"

namespace gloam {

// A request that has passed every check. A front end sets deadlines where it has one, then hands it
// to RunningGeneration::Start (server/running_generation.h).
struct PreparedGeneration {
  std::string id;                       // "cmpl-..." or "chatcmpl-..."
  std::vector<Request> requests;        // one per prompt; each with `n` answers (best_of of them)
  int num_choices_per_prompt = 1;       // < requests[i].n when best_of is larger
  bool echo = false;                    // completions: the answer starts with the prompt's text
  std::vector<std::string> echo_texts;  // one per prompt, when echo
  bool prompt_only = false;             // echo with max_tokens 0: what is generated is not answered
  int num_logprobs = -1;                // what the client asked for; the engine may compute more
  int num_prompt_logprobs = -1;
  StreamOptions stream;
};

struct GenerationServiceOptions {
  std::vector<std::string> served_model_names;  // the first is the one that answers carry
  std::shared_ptr<const PolicyRegistry> policies = nullptr;  // null: dense attention only
};

class GenerationService {
 public:
  // All references must outlive the service. `chat_template` may be null: chat requests are then
  // refused with a clear error.
  GenerationService(GenerationServiceOptions options, Engine& engine, const Tokenizer& tokenizer,
                    const ChatTemplate* chat_template, GenerationDefaults defaults);

  // Errors carry `param` and `code` (server/api_error.h). Text of a completion's prompt may name
  // special tokens ("<|fim_prefix|>"), as in vLLM; content of chat messages may not.
  [[nodiscard]] StatusOr<PreparedGeneration> Prepare(const CompletionRequest& request) const;
  [[nodiscard]] StatusOr<PreparedGeneration> Prepare(const ChatCompletionRequest& request) const;
  [[nodiscard]] StatusOr<std::vector<int32_t>> Tokenize(const TokenizeRequest& request) const;
  [[nodiscard]] StatusOr<std::string> Detokenize(const DetokenizeRequest& request) const;

  // An empty name (a request without `model`) means the served one, as in vLLM.
  // Errors: kNotFound with code model_not_found and param model.
  [[nodiscard]] Status CheckModel(const std::string& model) const;

  const std::string& model_name() const { return options_.served_model_names.front(); }
  const std::vector<std::string>& model_names() const { return options_.served_model_names; }
  const PolicyRegistry& policies() const { return *options_.policies; }
  bool has_chat_template() const { return chat_template_ != nullptr; }
  Engine& engine() const { return engine_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }

 private:
  StatusOr<int> CheckRoom(const GenerationParams& params, int64_t prompt_tokens,
                          const std::string& prompt_field,
                          std::optional<int> default_max_tokens) const;
  StatusOr<std::vector<int32_t>> TokenizePrompt(const PromptInput& prompt,
                                                const std::string& field) const;
  StatusOr<std::vector<int32_t>> TokenizeMessages(const std::vector<ChatMessage>& messages,
                                                  const RenderOptions& options) const;
  StatusOr<std::shared_ptr<const SparsityPolicy>> FindPolicy(const SparsityRequest& sparsity) const;

  GenerationServiceOptions options_;
  Engine& engine_;
  const Tokenizer& tokenizer_;
  const ChatTemplate* chat_template_;
  GenerationDefaults defaults_;
  int64_t max_prompt_bytes_;  // a longer text cannot fit the context, whatever it says
};

// An error about a policy (PolicyKeyOf) in the request's words, with its param:
// "sparsity.selector.type must be ...".
Status SparsityError(const Status& status);

}  // namespace gloam
