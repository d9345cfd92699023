#include "server/generation_service.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <random>
#include <utility>

#include "models/attention/policy_json.h"
#include "server/api_error.h"
#include "server/sampling_limits.h"

namespace gloam {
namespace {

constexpr int kDefaultCompletionTokens = 16;  // OpenAI's default of /v1/completions
constexpr std::array kRoles = {"system", "developer", "user", "assistant", "tool"};

// Names that a template gets from the server; a request may not set them.
constexpr std::array kReservedTemplateKwargs = {
    "messages",  "tools",     "add_generation_prompt", "continue_final_message", "chat_template",
    "bos_token", "eos_token", "raise_exception",       "strftime_now",           "tokenize"};

// Unicode normalisation (NFC, in some tokenizers) can shorten a text at most so many times.
constexpr int64_t kMaxNormalizationShrink = 3;

// Unique over restarts too: random start, then a counter.
std::string MakeId(std::string_view prefix) {
  static const uint64_t start = [] {
    std::random_device device;
    return (static_cast<uint64_t>(device()) << 32) | device();
  }();
  static std::atomic<uint64_t> counter = 0;
  return fmt::format("{}-{:016x}{:08x}", prefix, start, counter.fetch_add(1));
}

int64_t LongestTokenBytes(const Tokenizer& tokenizer) {
  size_t longest = 1;
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    longest = std::max(longest, tokenizer.TokenBytes(id, /*skip_special=*/false).size());
  }
  return static_cast<int64_t>(longest);
}

Status CheckMessages(const std::vector<ChatMessage>& messages) {
  if (messages.empty()) {
    return InvalidField("messages", "messages must hold at least one message");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    if (std::find(kRoles.begin(), kRoles.end(), messages[i].role) == kRoles.end()) {
      return InvalidField(fmt::format("messages[{}].role", i),
                          "messages[{}].role must be one of {}", i, fmt::join(kRoles, ", "));
    }
  }
  return OkStatus();
}

Status CheckTemplateKwargs(const nlohmann::ordered_json& kwargs) {
  for (const auto& [key, value] : kwargs.items()) {
    for (const char* reserved : kReservedTemplateKwargs) {
      if (key == reserved) {
        return InvalidField(fmt::format("chat_template_kwargs.{}", key),
                            "chat_template_kwargs may not set the reserved name '{}'", key);
      }
    }
  }
  return OkStatus();
}

nlohmann::ordered_json MessagesForTemplate(const std::vector<ChatMessage>& messages) {
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const ChatMessage& message : messages) {
    nlohmann::ordered_json entry;
    entry["role"] = message.role == "developer" ? "system" : message.role;
    entry["content"] = message.content;
    if (message.extra.is_object()) entry.update(message.extra);
    out.push_back(std::move(entry));
  }
  return out;
}

// Checks that only a stream or only a whole answer can meet.
Status CheckStream(const GenerationParams& params, const StreamOptions& stream) {
  if (!stream.stream) return OkStatus();
  if (params.num_prompt_logprobs) {
    return InvalidField("prompt_logprobs", "prompt_logprobs are not available with stream");
  }
  if (params.best_of && *params.best_of > params.n.value_or(1)) {
    return InvalidField("best_of", "best_of larger than n is not available with stream");
  }
  return OkStatus();
}

Status SetDecodedPromptTokens(const GenerationParams& params, Request* request) {
  const int64_t num_tokens = params.num_decoded_prompt_tokens;
  const auto num_prompt_tokens = static_cast<int64_t>(request->prompt.size());
  if (num_tokens < 0 || num_tokens >= num_prompt_tokens) {
    return InvalidField("sparsity_decode_prompt_tokens",
                        "sparsity_decode_prompt_tokens must be between 0 and {}, one less than the "
                        "prompt's tokens, got {}",
                        num_prompt_tokens - 1, num_tokens);
  }
  request->num_decoded_prompt_tokens = static_cast<int>(num_tokens);
  return OkStatus();
}

}  // namespace

GenerationService::GenerationService(GenerationServiceOptions options, Engine& engine,
                                     const Tokenizer& tokenizer, const ChatTemplate* chat_template,
                                     GenerationDefaults defaults)
    : options_(std::move(options)),
      engine_(engine),
      tokenizer_(tokenizer),
      chat_template_(chat_template),
      defaults_(std::move(defaults)),
      max_prompt_bytes_(engine.max_model_len() * LongestTokenBytes(tokenizer) *
                        kMaxNormalizationShrink) {
  if (options_.policies == nullptr) options_.policies = std::make_shared<const PolicyRegistry>();
}

Status GenerationService::CheckModel(const std::string& model) const {
  const auto& names = options_.served_model_names;
  if (model.empty()) return OkStatus();
  if (std::find(names.begin(), names.end(), model) != names.end()) return OkStatus();
  return WithErrorCode(
      WithParam(NotFound("The model does not exist; this server serves {} (--served-model-name)",
                         fmt::join(names, ", ")),
                "model"),
      kModelNotFoundCode);
}

StatusOr<std::vector<int32_t>> GenerationService::TokenizePrompt(const PromptInput& prompt,
                                                                 const std::string& field) const {
  const auto too_long = [&](std::string_view what) {
    return WithErrorCode(
        InvalidField(field,
                     "This model's maximum context length is {} tokens (--max-model-len), but {}; "
                     "please shorten the prompt",
                     engine_.max_model_len(), what),
        kContextLengthCode);
  };
  if (const auto* ids = std::get_if<std::vector<int64_t>>(&prompt)) {
    if (ids->empty()) return InvalidField(field, "{} may not be empty", field);
    if (static_cast<int64_t>(ids->size()) >= engine_.max_model_len()) {
      return too_long(fmt::format("the prompt has {} tokens", ids->size()));
    }
    std::vector<int32_t> tokens;
    tokens.reserve(ids->size());
    for (const int64_t id : *ids) {
      if (id < 0 || id >= tokenizer_.vocab_size()) {
        return InvalidField(field, "{} must hold token ids between 0 and {}, got {}", field,
                            tokenizer_.vocab_size() - 1, id);
      }
      tokens.push_back(static_cast<int32_t>(id));
    }
    return tokens;
  }
  const std::string& text = std::get<std::string>(prompt);
  if (text.empty()) return InvalidField(field, "{} may not be empty", field);
  if (static_cast<int64_t>(text.size()) > max_prompt_bytes_) {
    return too_long(fmt::format("the prompt's {} bytes make more tokens than that", text.size()));
  }
  const TextPart part{text, /*allow_special=*/true};
  GLOAM_ASSIGN_OR_RETURN(auto tokens, tokenizer_.Encode({&part, 1}, /*add_special=*/true));
  if (tokens.empty()) return InvalidField(field, "{} makes no tokens", field);
  return tokens;
}

StatusOr<std::vector<int32_t>> GenerationService::TokenizeMessages(
    const std::vector<ChatMessage>& messages, const RenderOptions& options) const {
  if (chat_template_ == nullptr) {
    return InvalidField("messages",
                        "the model has no chat template: use /v1/completions, or start the server "
                        "with --chat-template");
  }
  GLOAM_RETURN_IF_ERROR(CheckMessages(messages));
  int64_t bytes = 0;
  for (const ChatMessage& message : messages) bytes += static_cast<int64_t>(message.content.size());
  if (bytes > max_prompt_bytes_) {
    return WithErrorCode(
        InvalidField("messages",
                     "This model's maximum context length is {} tokens (--max-model-len), but the "
                     "messages' {} bytes make more tokens than that; please shorten them",
                     engine_.max_model_len(), bytes),
        kContextLengthCode);
  }
  auto rendered = chat_template_->Render(MessagesForTemplate(messages), options);
  if (!rendered.ok()) return WithParam(rendered.status(), "messages");
  // The template itself prints BOS where the model wants it.
  const std::vector<TextPart> parts = rendered->TextParts();
  GLOAM_ASSIGN_OR_RETURN(auto tokens, tokenizer_.Encode(parts, /*add_special=*/false));
  if (tokens.empty()) return InvalidField("messages", "the messages make no tokens");
  return tokens;
}

// The request's max_tokens once the prompt's length is known.
StatusOr<int> GenerationService::CheckRoom(const GenerationParams& params, int64_t prompt_tokens,
                                           const std::string& prompt_field,
                                           std::optional<int> default_max_tokens) const {
  const int64_t context = engine_.max_model_len();
  if (prompt_tokens >= context) {
    return WithErrorCode(
        InvalidField(prompt_field,
                     "This model's maximum context length is {} tokens (--max-model-len). However, "
                     "your {} resulted in {} tokens, which leaves no room for an answer. Please "
                     "reduce its length",
                     context, prompt_field, prompt_tokens),
        kContextLengthCode);
  }
  const int64_t room = context - prompt_tokens;
  const int64_t max_tokens =
      params.max_tokens.value_or(std::min<int64_t>(room, default_max_tokens.value_or(room)));
  if (max_tokens > room) {
    return WithErrorCode(
        InvalidField(params.max_tokens_field,
                     "This model's maximum context length is {} tokens (--max-model-len). However, "
                     "you requested {} tokens ({} in the {}, {} in the completion). Please reduce "
                     "the length of the {} or the completion",
                     context, prompt_tokens + max_tokens, prompt_tokens, prompt_field, max_tokens,
                     prompt_field),
        kContextLengthCode);
  }
  return static_cast<int>(max_tokens);
}

StatusOr<std::shared_ptr<const SparsityPolicy>> GenerationService::FindPolicy(
    const SparsityRequest& sparsity) const {
  const PolicyRegistry& registry = *options_.policies;
  auto policy =
      sparsity.body.is_null()
          ? registry.Find(sparsity.policy.value_or(registry.default_name()), sparsity.overrides)
          : registry.Parse(sparsity.body);
  if (!policy.ok()) return SparsityError(policy.status());
  return policy;
}

StatusOr<PreparedGeneration> GenerationService::Prepare(const CompletionRequest& request) const {
  const GenerationParams& params = request.params;
  GLOAM_RETURN_IF_ERROR(CheckModel(request.model));
  GLOAM_RETURN_IF_ERROR(CheckParams(params, tokenizer_.vocab_size()));
  GLOAM_RETURN_IF_ERROR(CheckStream(params, request.stream));
  if (request.suffix && !request.suffix->empty()) {
    return InvalidField("suffix", "suffix is not supported: this model cannot infill");
  }
  const bool prompt_only = params.max_tokens == 0;
  if (prompt_only && !request.echo) {
    return InvalidField("max_tokens", "max_tokens must be at least 1 (0 only with echo)");
  }
  if (request.prompts.empty()) return InvalidField("prompt", "prompt may not be empty");
  const int64_t answers = params.best_of.value_or(params.n.value_or(1));
  if (static_cast<int64_t>(request.prompts.size()) > kMaxChoices / answers) {
    return InvalidField("prompt", "a request may ask for at most {} answers, got {} prompts x {}",
                        kMaxChoices, request.prompts.size(), answers);
  }

  GLOAM_ASSIGN_OR_RETURN(const auto policy, FindPolicy(params.sparsity));

  PreparedGeneration prepared;
  prepared.id = MakeId("cmpl");
  prepared.num_choices_per_prompt = static_cast<int>(params.n.value_or(1));
  prepared.echo = request.echo;
  prepared.prompt_only = prompt_only;
  prepared.stream = request.stream;

  SamplingParams sampling = MakeSampling(params, defaults_);
  prepared.num_logprobs = sampling.num_logprobs;
  prepared.num_prompt_logprobs = sampling.num_prompt_logprobs;
  if (request.echo) {  // the prompt's own log-probabilities lead the answer's
    sampling.num_prompt_logprobs = std::max(sampling.num_prompt_logprobs, sampling.num_logprobs);
  }
  if (answers > params.n.value_or(1)) {  // the answers are ranked by log-probability
    sampling.num_logprobs = std::max(sampling.num_logprobs, 0);
  }
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const std::string field =
        request.prompts.size() == 1 ? std::string("prompt") : fmt::format("prompt[{}]", i);
    Request engine_request;
    GLOAM_ASSIGN_OR_RETURN(engine_request.prompt, TokenizePrompt(request.prompts[i], field));
    GLOAM_ASSIGN_OR_RETURN(const int max_tokens,
                           CheckRoom(params, static_cast<int64_t>(engine_request.prompt.size()),
                                     field, kDefaultCompletionTokens));
    GLOAM_RETURN_IF_ERROR(SetDecodedPromptTokens(params, &engine_request));
    engine_request.sparsity = policy;
    engine_request.id =
        request.prompts.size() == 1 ? prepared.id : fmt::format("{}-{}", prepared.id, i);
    engine_request.sampling = sampling;
    engine_request.sampling.max_tokens = std::max(1, max_tokens);
    engine_request.n = static_cast<int>(answers);
    engine_request.priority = static_cast<int>(params.priority);
    if (request.echo) {
      const auto* text = std::get_if<std::string>(&request.prompts[i]);
      prepared.echo_texts.push_back(
          text != nullptr ? *text
                          : tokenizer_.Decode(engine_request.prompt, /*skip_special=*/false));
    }
    prepared.requests.push_back(std::move(engine_request));
  }
  return prepared;
}

StatusOr<PreparedGeneration> GenerationService::Prepare(
    const ChatCompletionRequest& request) const {
  const GenerationParams& params = request.params;
  GLOAM_RETURN_IF_ERROR(CheckModel(request.model));
  GLOAM_RETURN_IF_ERROR(CheckParams(params, tokenizer_.vocab_size()));
  GLOAM_RETURN_IF_ERROR(CheckStream(params, request.stream));
  if (params.max_tokens == 0) {
    return InvalidField(params.max_tokens_field, "{} must be at least 1", params.max_tokens_field);
  }
  if (request.add_generation_prompt && request.continue_final_message) {
    return InvalidField("continue_final_message",
                        "continue_final_message needs add_generation_prompt: false");
  }
  GLOAM_RETURN_IF_ERROR(CheckTemplateKwargs(request.chat_template_kwargs));
  GLOAM_ASSIGN_OR_RETURN(auto policy, FindPolicy(params.sparsity));

  RenderOptions render;
  render.add_generation_prompt = request.add_generation_prompt;
  render.continue_final_message = request.continue_final_message;
  render.tools = request.tools;
  render.extra = request.chat_template_kwargs;

  PreparedGeneration prepared;
  prepared.id = MakeId("chatcmpl");
  prepared.num_choices_per_prompt = static_cast<int>(params.n.value_or(1));
  prepared.stream = request.stream;

  Request engine_request;
  GLOAM_ASSIGN_OR_RETURN(engine_request.prompt, TokenizeMessages(request.messages, render));
  GLOAM_ASSIGN_OR_RETURN(const int max_tokens,
                         CheckRoom(params, static_cast<int64_t>(engine_request.prompt.size()),
                                   "messages", std::nullopt));
  GLOAM_RETURN_IF_ERROR(SetDecodedPromptTokens(params, &engine_request));
  engine_request.sparsity = std::move(policy);
  engine_request.id = prepared.id;
  engine_request.sampling = MakeSampling(params, defaults_);
  engine_request.sampling.max_tokens = max_tokens;
  engine_request.n = prepared.num_choices_per_prompt;
  engine_request.priority = static_cast<int>(params.priority);
  prepared.num_logprobs = engine_request.sampling.num_logprobs;
  prepared.num_prompt_logprobs = engine_request.sampling.num_prompt_logprobs;
  prepared.requests.push_back(std::move(engine_request));
  return prepared;
}

StatusOr<std::vector<int32_t>> GenerationService::Tokenize(const TokenizeRequest& request) const {
  GLOAM_RETURN_IF_ERROR(CheckModel(request.model));
  if (const auto* text = std::get_if<std::string>(&request.input)) {
    const TextPart part{*text, /*allow_special=*/true};
    return tokenizer_.Encode({&part, 1}, request.add_special_tokens);
  }
  RenderOptions render;
  render.add_generation_prompt = request.add_generation_prompt;
  return TokenizeMessages(std::get<std::vector<ChatMessage>>(request.input), render);
}

StatusOr<std::string> GenerationService::Detokenize(const DetokenizeRequest& request) const {
  GLOAM_RETURN_IF_ERROR(CheckModel(request.model));
  std::vector<int32_t> tokens;
  tokens.reserve(request.tokens.size());
  for (const int64_t id : request.tokens) {
    if (id < 0 || id >= tokenizer_.vocab_size()) {
      return InvalidField("tokens", "tokens must hold token ids between 0 and {}, got {}",
                          tokenizer_.vocab_size() - 1, id);
    }
    tokens.push_back(static_cast<int32_t>(id));
  }
  return tokenizer_.Decode(tokens, /*skip_special=*/false);
}

Status SparsityError(const Status& status) {
  const std::string key = PolicyKeyOf(status);
  if (key.empty()) return InvalidField("sparsity", "{}", MessageOf(status));
  return InvalidField("sparsity." + key, "sparsity.{}", MessageOf(status));
}

}  // namespace gloam
