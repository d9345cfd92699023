// The API's nouns, free of any wire format: what the HTTP codec makes of JSON and the gRPC codec
// makes of protobuf. A codec only translates and checks types; ranges and everything that needs
// the model are checked in one place, GenerationService (server/generation_service.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "models/attention/policy_registry.h"
#include "nlohmann/json.hpp"

namespace gloam {

// How a request wants its decode attention: a policy of the server by name, with changes, or a
// whole policy of its own. Nothing set: the server's default.
struct SparsityRequest {
  std::optional<std::string> policy = {};
  PolicyOverrides overrides = {};
  nlohmann::ordered_json body = nullptr;  // an object (models/attention/policy_json.h) or null
};

// Absent fields take the model's generation defaults, then OpenAI's.
struct GenerationParams {
  std::optional<int64_t> max_tokens;
  std::optional<int64_t> min_tokens;
  std::optional<int64_t> n;
  std::optional<int64_t> best_of;  // completions only
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<double> min_p;
  std::optional<int64_t> top_k;  // -1 or 0: all
  std::optional<double> repetition_penalty;
  std::optional<double> frequency_penalty;
  std::optional<double> presence_penalty;
  std::optional<int64_t> seed;
  std::vector<std::string> stop;
  std::vector<int64_t> stop_token_ids;
  std::vector<std::pair<int64_t, double>> logit_bias;
  bool include_stop_str_in_output = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  std::optional<int64_t> num_logprobs;         // completions: logprobs; chat: top_logprobs or 0
  std::optional<int64_t> num_prompt_logprobs;  // prompt_logprobs
  int64_t priority = 0;
  SparsityRequest sparsity;
  int64_t num_decoded_prompt_tokens = 0;  // sparsity_decode_prompt_tokens

  // What the client called these fields, for error messages; literals.
  std::string_view max_tokens_field = "max_tokens";
  std::string_view logprobs_field = "logprobs";
};

struct StreamOptions {
  bool stream = false;
  bool include_usage = false;
};

using PromptInput = std::variant<std::string, std::vector<int64_t>>;

struct CompletionRequest {
  std::string model;
  std::vector<PromptInput> prompts;  // one answer (times n) each
  std::optional<std::string> suffix;
  bool echo = false;
  GenerationParams params;
  StreamOptions stream;
};

struct ChatMessage {
  std::string role;     // system, developer, user, assistant, tool
  std::string content;  // text parts joined
  nlohmann::ordered_json
      extra;  // name, tool_calls, tool_call_id: passed to the template; object or null
};

struct ChatCompletionRequest {
  std::string model;
  std::vector<ChatMessage> messages;
  nlohmann::ordered_json tools;  // array or null, for the template
  bool add_generation_prompt = true;
  bool continue_final_message = false;
  nlohmann::ordered_json chat_template_kwargs;  // object or null
  GenerationParams params;
  StreamOptions stream;
};

struct TokenizeRequest {
  std::string model;
  std::variant<std::string, std::vector<ChatMessage>> input;
  bool add_special_tokens = true;
  bool add_generation_prompt = true;
};

struct DetokenizeRequest {
  std::string model;
  std::vector<int64_t> tokens;
};

}  // namespace gloam
