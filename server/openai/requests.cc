#include "server/openai/requests.h"

#include <charconv>
#include <utility>

#include "server/api_error.h"
#include "server/openai/json_fields.h"
#include "server/strict_json.h"

namespace gloam {
namespace {

using json = nlohmann::ordered_json;

StatusOr<json> ParseBody(std::string_view body) {
  GLOAM_ASSIGN_OR_RETURN(json parsed, ParseStrictJson(body));
  if (!parsed.is_object()) return InvalidArgument("The request body must be a JSON object");
  return parsed;
}

void ReadStop(JsonFields& fields, std::vector<std::string>* out) {
  const json* stop = fields.Find("stop");
  if (stop == nullptr) return;
  if (stop->is_string()) {
    out->push_back(stop->get<std::string>());
    return;
  }
  if (!stop->is_array()) return fields.FailType("stop", "a string or an array of strings");
  for (const json& element : *stop) {
    if (!element.is_string()) return fields.FailType("stop", "a string or an array of strings");
    out->push_back(element.get<std::string>());
  }
}

void ReadLogitBias(JsonFields& fields, std::vector<std::pair<int64_t, double>>* out) {
  const json* bias = fields.Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) return fields.FailType("logit_bias", "an object of token ids to numbers");
  out->reserve(bias->size());
  for (const auto& [key, value] : bias->items()) {
    int64_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size()) {
      return fields.FailType("logit_bias", "an object whose keys are token ids");
    }
    if (!value.is_number()) return fields.FailType("logit_bias", "an object of numbers");
    out->emplace_back(id, value.get<double>());
  }
}

void ReadStream(JsonFields& fields, StreamOptions* out) {
  fields.Read("stream", &out->stream);
  const json* options = fields.Find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) return fields.FailType("stream_options", "an object");
  if (!out->stream) {
    return fields.Fail(
        InvalidField("stream_options", "stream_options is only allowed with stream: true"));
  }
  JsonFields nested(*options, "stream_options.");
  nested.Read("include_usage", &out->include_usage);
  fields.Fail(nested.status());
}

// What would constrain the output; never answered with unconstrained output.
void RefuseStructuredOutput(JsonFields& fields) {
  if (const json* format = fields.Find("response_format")) {
    if (!format->is_object()) return fields.FailType("response_format", "an object");
    const auto type = format->find("type");
    if (type == format->end() || !type->is_string() || *type != "text") {
      return fields.Fail(
          InvalidField("response_format", "response_format supports only the type 'text'"));
    }
  }
  for (const char* name : {"structured_outputs", "guided_json", "guided_regex", "guided_choice",
                           "guided_grammar", "structural_tag"}) {
    if (fields.Find(name) != nullptr) {
      return fields.Fail(InvalidField(name, "{} is not supported", name));
    }
  }
}

// A policy's name; a policy's name with changes, of which no whole policy has the first three keys;
// or a whole policy.
void ReadSparsity(JsonFields& fields, SparsityRequest* out) {
  const json* sparsity = fields.Find("sparsity");
  if (sparsity == nullptr) return;
  if (sparsity->is_string()) {
    out->policy = sparsity->get<std::string>();
    return;
  }
  if (!sparsity->is_object()) return fields.FailType("sparsity", "a policy's name or an object");
  const auto has = [&](const char* key) { return sparsity->contains(key); };
  if (!has("policy") && !has("p") && !has("token_budget")) {
    out->body = *sparsity;
    return;
  }
  JsonFields changes(*sparsity, "sparsity.");
  changes.Read("policy", &out->policy);
  changes.Read("p", &out->overrides.p);
  changes.Read("token_budget", &out->overrides.token_budget);
  if (has("report_true_mass")) {
    changes.Read("report_true_mass", &out->overrides.report_true_mass.emplace());
  }
  for (const auto& [key, value] : sparsity->items()) {
    if (key == "policy" || key == "p" || key == "token_budget" || key == "report_true_mass") {
      continue;
    }
    changes.Fail(InvalidField("sparsity." + key,
                              "sparsity takes only p, token_budget and report_true_mass beside "
                              "policy; whatever else differs makes a whole policy"));
  }
  fields.Fail(changes.status());
}

// Fields that change the answer in a way that this server cannot.
void RefuseUnsupported(JsonFields& fields) {
  bool store = false, beam_search = false;
  fields.Read("store", &store);
  fields.Read("use_beam_search", &beam_search);
  if (store) fields.Fail(InvalidField("store", "store must be false: nothing is stored"));
  if (beam_search) {
    fields.Fail(InvalidField("use_beam_search", "use_beam_search is not supported"));
  }
  if (fields.Find("chat_template") != nullptr) {
    fields.Fail(InvalidField("chat_template",
                             "a request may not bring a chat_template; the server's is set with "
                             "--chat-template"));
  }
}

// The fields that both kinds of generation share.
void ReadParams(JsonFields& fields, GenerationParams* p) {
  fields.Read("max_tokens", &p->max_tokens);
  fields.Read("min_tokens", &p->min_tokens);
  fields.Read("n", &p->n);
  fields.Read("temperature", &p->temperature);
  fields.Read("top_p", &p->top_p);
  fields.Read("min_p", &p->min_p);
  fields.Read("top_k", &p->top_k);
  fields.Read("repetition_penalty", &p->repetition_penalty);
  fields.Read("frequency_penalty", &p->frequency_penalty);
  fields.Read("presence_penalty", &p->presence_penalty);
  fields.Read("seed", &p->seed);
  ReadStop(fields, &p->stop);
  fields.Read("stop_token_ids", &p->stop_token_ids);
  ReadLogitBias(fields, &p->logit_bias);
  fields.Read("include_stop_str_in_output", &p->include_stop_str_in_output);
  fields.Read("ignore_eos", &p->ignore_eos);
  fields.Read("skip_special_tokens", &p->skip_special_tokens);
  fields.Read("prompt_logprobs", &p->num_prompt_logprobs);
  fields.Read("priority", &p->priority);
  RefuseStructuredOutput(fields);
  ReadSparsity(fields, &p->sparsity);
  fields.Read("sparsity_decode_prompt_tokens", &p->num_decoded_prompt_tokens);
  RefuseUnsupported(fields);
}

// A list of token ids, or of prompts that are texts or lists of token ids.
void ReadPrompts(JsonFields& fields, std::vector<PromptInput>* out) {
  constexpr std::string_view kWanted =
      "a string, an array of strings, an array of token ids, or an array of such arrays";
  const json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return fields.Fail(InvalidField("prompt", "prompt is required"));
  const auto read_ids = [](const json& array, std::vector<int64_t>* ids) {
    ids->reserve(array.size());
    for (const json& element : array) {
      const auto id = AsInteger(element);
      if (!id) return false;
      ids->push_back(*id);
    }
    return true;
  };
  if (prompt->is_string()) {
    out->emplace_back(prompt->get<std::string>());
    return;
  }
  if (!prompt->is_array()) return fields.FailType("prompt", kWanted);
  if (prompt->empty()) return;
  if (prompt->front().is_number()) {
    std::vector<int64_t> ids;
    if (!read_ids(*prompt, &ids)) return fields.FailType("prompt", kWanted);
    out->emplace_back(std::move(ids));
    return;
  }
  for (size_t i = 0; i < prompt->size(); ++i) {
    const json& element = (*prompt)[i];
    if (element.is_string()) {
      out->emplace_back(element.get<std::string>());
      continue;
    }
    std::vector<int64_t> ids;
    if (!element.is_array() || !read_ids(element, &ids)) {
      return fields.FailType(fmt::format("prompt[{}]", i), "a string or an array of token ids");
    }
    out->emplace_back(std::move(ids));
  }
}

// The text of a message: a string, or text parts joined by line feeds (as vLLM does).
void ReadContent(JsonFields& message, std::string* out) {
  const json* content = message.Find("content");
  if (content == nullptr) return;
  if (content->is_string()) {
    *out = content->get<std::string>();
    return;
  }
  if (!content->is_array()) return message.FailType("content", "a string or an array of parts");
  for (size_t i = 0; i < content->size(); ++i) {
    const std::string name = fmt::format("content[{}]", i);
    if (!(*content)[i].is_object()) return message.FailType(name, "an object");
    JsonFields part((*content)[i], message.PathOf(name) + ".");
    std::string type;
    std::optional<std::string> text;
    part.Read("type", &type);
    if (part.ok() && type != "text") {
      part.Fail(InvalidField(part.PathOf("type"),
                             "{} must be 'text': this model takes no images, audio or files",
                             part.PathOf("type")));
    }
    part.Read("text", &text);
    if (part.ok() && !text) part.FailType("text", "a string");
    if (!part.ok()) return message.Fail(part.status());
    if (i > 0) out->push_back('\n');
    *out += *text;
  }
}

// Arguments of earlier tool calls come as JSON text; templates want the values.
json ToolCallsForTemplate(json calls) {
  for (json& call : calls) {
    if (!call.is_object() || !call.contains("function")) continue;
    json& function = call["function"];
    if (!function.is_object() || !function.contains("arguments")) continue;
    if (!function["arguments"].is_string()) continue;
    auto parsed = ParseStrictJson(function["arguments"].get_ref<const std::string&>());
    if (parsed.ok() && parsed->is_object()) function["arguments"] = *std::move(parsed);
  }
  return calls;
}

void ReadMessage(JsonFields& message, ChatMessage* out) {
  std::optional<std::string> role, name, tool_call_id;
  message.Read("role", &role);
  if (message.ok() && !role) message.FailType("role", "a string");
  out->role = role.value_or("");
  ReadContent(message, &out->content);
  message.Read("name", &name);
  message.Read("tool_call_id", &tool_call_id);
  const json* tool_calls = message.Find("tool_calls");
  if (tool_calls != nullptr && !tool_calls->is_array()) {
    message.FailType("tool_calls", "an array");
  }
  if (message.Find("content") == nullptr && tool_calls == nullptr &&
      message.Find("refusal") == nullptr) {
    message.FailType("content", "a string or an array of text parts");
  }
  if (!message.ok()) return;
  if (name) out->extra["name"] = *name;
  if (tool_call_id) out->extra["tool_call_id"] = *tool_call_id;
  if (tool_calls != nullptr) out->extra["tool_calls"] = ToolCallsForTemplate(*tool_calls);
}

void ReadMessages(JsonFields& fields, std::vector<ChatMessage>* out) {
  const json* messages = fields.Find("messages");
  if (messages == nullptr) return fields.Fail(InvalidField("messages", "messages is required"));
  if (!messages->is_array()) return fields.FailType("messages", "an array of messages");
  out->reserve(messages->size());
  for (size_t i = 0; i < messages->size(); ++i) {
    const std::string name = fmt::format("messages[{}]", i);
    if (!(*messages)[i].is_object()) return fields.FailType(name, "an object");
    JsonFields message((*messages)[i], name + ".");
    ReadMessage(message, &out->emplace_back());
    if (!message.ok()) return fields.Fail(message.status());
  }
}

void ReadTools(JsonFields& fields, json* out) {
  if (const json* tools = fields.Find("tools")) {
    if (!tools->is_array()) return fields.FailType("tools", "an array");
    if (!tools->empty()) *out = *tools;
  }
  if (const json* choice = fields.Find("tool_choice")) {
    if (*choice != "none" && *choice != "auto") {
      return fields.Fail(InvalidField(
          "tool_choice", "tool_choice must be 'none' or 'auto': calls are not forced"));
    }
    if (*choice == "none") *out = nullptr;
  }
  for (const char* name : {"functions", "function_call"}) {
    if (fields.Find(name) != nullptr) {
      return fields.Fail(InvalidField(name, "{} is deprecated and not supported; use tools", name));
    }
  }
}

void ReadChatLogprobs(JsonFields& fields, GenerationParams* params) {
  bool logprobs = false;
  fields.Read("logprobs", &logprobs);
  std::optional<int64_t> top_logprobs;
  fields.Read("top_logprobs", &top_logprobs);
  if (top_logprobs && !logprobs) {
    return fields.Fail(InvalidField("top_logprobs", "top_logprobs needs logprobs: true"));
  }
  if (logprobs) params->num_logprobs = top_logprobs.value_or(0);
  params->logprobs_field = "top_logprobs";
}

void RefuseModalities(JsonFields& fields) {
  const json* modalities = fields.Find("modalities");
  if (modalities != nullptr && *modalities != json::array({"text"})) {
    fields.Fail(InvalidField("modalities", "modalities must be [\"text\"]"));
  }
  if (fields.Find("audio") != nullptr) {
    fields.Fail(InvalidField("audio", "audio is not supported"));
  }
}

}  // namespace

StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body) {
  GLOAM_ASSIGN_OR_RETURN(const json parsed, ParseBody(body));
  JsonFields fields(parsed);
  CompletionRequest request;
  fields.Read("model", &request.model);
  ReadPrompts(fields, &request.prompts);
  fields.Read("suffix", &request.suffix);
  fields.Read("echo", &request.echo);
  ReadParams(fields, &request.params);
  fields.Read("best_of", &request.params.best_of);
  fields.Read("logprobs", &request.params.num_logprobs);
  ReadStream(fields, &request.stream);
  if (!fields.ok()) return fields.status();
  return request;
}

StatusOr<ChatCompletionRequest> ParseChatCompletionRequest(std::string_view body) {
  GLOAM_ASSIGN_OR_RETURN(const json parsed, ParseBody(body));
  JsonFields fields(parsed);
  ChatCompletionRequest request;
  fields.Read("model", &request.model);
  ReadMessages(fields, &request.messages);
  ReadParams(fields, &request.params);
  if (fields.Find("max_completion_tokens") != nullptr) {  // wins over the older name
    fields.Read("max_completion_tokens", &request.params.max_tokens);
    request.params.max_tokens_field = "max_completion_tokens";
  }
  ReadChatLogprobs(fields, &request.params);
  ReadTools(fields, &request.tools);
  RefuseModalities(fields);
  fields.Read("add_generation_prompt", &request.add_generation_prompt);
  fields.Read("continue_final_message", &request.continue_final_message);
  if (const json* kwargs = fields.Find("chat_template_kwargs")) {
    if (!kwargs->is_object()) fields.FailType("chat_template_kwargs", "an object");
    request.chat_template_kwargs = *kwargs;
  }
  ReadStream(fields, &request.stream);
  if (!fields.ok()) return fields.status();
  return request;
}

StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body) {
  GLOAM_ASSIGN_OR_RETURN(const json parsed, ParseBody(body));
  JsonFields fields(parsed);
  TokenizeRequest request;
  fields.Read("model", &request.model);
  if (fields.Find("messages") != nullptr) {
    ReadMessages(fields, &request.input.emplace<std::vector<ChatMessage>>());
  } else {
    std::optional<std::string> prompt;
    fields.Read("prompt", &prompt);
    if (fields.ok() && !prompt) {
      fields.Fail(InvalidField("prompt", "prompt (a string) or messages is required"));
    }
    request.input = prompt.value_or("");
  }
  fields.Read("add_special_tokens", &request.add_special_tokens);
  fields.Read("add_generation_prompt", &request.add_generation_prompt);
  if (!fields.ok()) return fields.status();
  return request;
}

StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body) {
  GLOAM_ASSIGN_OR_RETURN(const json parsed, ParseBody(body));
  JsonFields fields(parsed);
  DetokenizeRequest request;
  fields.Read("model", &request.model);
  if (fields.Find("tokens") == nullptr) {
    fields.Fail(InvalidField("tokens", "tokens is required"));
  }
  fields.Read("tokens", &request.tokens);
  if (!fields.ok()) return fields.status();
  return request;
}

}  // namespace gloam
