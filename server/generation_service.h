// GenerationService: what both front ends call. It validates an API request against the model's
// limits, applies defaults and the chat template, tokenises, and submits to the engine.
// Immutable after construction, except for its own request counters; any thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/chat_template.h"
#include "engine/engine.h"
#include "server/api.h"

namespace gloam {

// A request that has passed every check, ready for Engine::Submit: one engine request per prompt.
struct PreparedGeneration {
  std::string id;                  // "cmpl-..." or "chatcmpl-..."
  std::vector<Request> requests;   // one per prompt; each with `n` answers (best_of of them)
  int num_choices_per_prompt = 1;  // <= requests[i].n when best_of is larger
  bool echo = false;               // completions: the answer starts with the prompt's text
  std::vector<std::string> echo_texts;  // one per prompt, when echo
  int num_logprobs = -1;
  StreamOptions stream;
};

struct GenerationServiceOptions {
  std::vector<std::string> served_model_names;  // the first is the one that answers carry
};

class GenerationService {
 public:
  // All references must outlive the service. `chat_template` may be null: chat requests are then
  // refused with a clear error.
  GenerationService(GenerationServiceOptions options, Engine& engine, const Tokenizer& tokenizer,
                    const ChatTemplate* chat_template, GenerationDefaults defaults);

  // Errors carry `param` and `code` (server/api_error.h).
  [[nodiscard]] StatusOr<PreparedGeneration> Prepare(const CompletionRequest& request) const;
  [[nodiscard]] StatusOr<PreparedGeneration> Prepare(const ChatCompletionRequest& request) const;
  [[nodiscard]] StatusOr<std::vector<int32_t>> Tokenize(const TokenizeRequest& request) const;
  [[nodiscard]] StatusOr<std::string> Detokenize(const DetokenizeRequest& request) const;

  // Errors: kNotFound with code model_not_found and param model.
  [[nodiscard]] Status CheckModel(const std::string& model) const;

  const std::string& model_name() const { return options_.served_model_names.front(); }
  const std::vector<std::string>& model_names() const { return options_.served_model_names; }
  Engine& engine() const { return engine_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }

 private:
  GenerationServiceOptions options_;
  Engine& engine_;
  const Tokenizer& tokenizer_;
  const ChatTemplate* chat_template_;
  GenerationDefaults defaults_;
};

}  // namespace gloam
