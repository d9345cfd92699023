#include "server/grpc/codec.h"

#include <cmath>
#include <string>
#include <utility>

#include "base/check.h"
#include "google/protobuf/struct.pb.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "server/api_error.h"
#include "server/strict_json.h"

namespace gloam {
namespace {

using google::protobuf::Struct;
using google::protobuf::Value;
using json = nlohmann::ordered_json;

json ToJson(const Struct& object);

json ToJson(const Value& value) {
  switch (value.kind_case()) {
    case Value::kNumberValue: {
      // Struct knows only doubles; a template that prints a number expects 3, not 3.0.
      const double number = value.number_value();
      constexpr double kMaxExact = 9007199254740992.0;  // 2^53
      if (std::floor(number) == number && std::abs(number) <= kMaxExact) {
        return static_cast<int64_t>(number);
      }
      return number;
    }
    case Value::kStringValue:
      return value.string_value();
    case Value::kBoolValue:
      return value.bool_value();
    case Value::kStructValue:
      return ToJson(value.struct_value());
    case Value::kListValue: {
      json list = json::array();
      for (const Value& item : value.list_value().values()) list.push_back(ToJson(item));
      return list;
    }
    case Value::kNullValue:
    case Value::KIND_NOT_SET:
      return nullptr;
  }
  return nullptr;
}

json ToJson(const Struct& object) {
  json result = json::object();
  for (const auto& [key, value] : object.fields()) result[key] = ToJson(value);
  return result;
}

StatusOr<SparsityRequest> ToApi(const v1::SparsityOptions& message) {
  SparsityRequest request;
  if (message.has_policy()) request.policy = message.policy();
  if (message.has_p()) request.overrides.p = message.p();
  if (message.has_token_budget()) request.overrides.token_budget = message.token_budget();
  if (message.has_report_true_mass()) {
    request.overrides.report_true_mass = message.report_true_mass();
  }
  if (!message.has_policy_json()) return request;
  if (request.policy || !request.overrides.empty()) {
    return InvalidField("sparsity.policy_json",
                        "sparsity.policy_json is a whole policy and goes with no other field");
  }
  auto body = ParseStrictJson(message.policy_json());
  if (!body.ok()) return WithParam(body.status(), "sparsity.policy_json");
  if (!body->is_object()) {
    return InvalidField("sparsity.policy_json", "sparsity.policy_json must be a JSON object");
  }
  request.body = *std::move(body);
  return request;
}

// The fields that completions and chat completions share by name.
template <typename Message>
StatusOr<GenerationParams> ToParams(const Message& message) {
  GenerationParams params;
  GLOAM_ASSIGN_OR_RETURN(params.sparsity, ToApi(message.sparsity()));
  params.num_decoded_prompt_tokens = message.sparsity_decode_prompt_tokens();
  if (message.has_n()) params.n = message.n();
  if (message.has_temperature()) params.temperature = message.temperature();
  if (message.has_top_p()) params.top_p = message.top_p();
  if (message.has_top_k()) params.top_k = message.top_k();
  if (message.has_min_p()) params.min_p = message.min_p();
  if (message.has_repetition_penalty()) params.repetition_penalty = message.repetition_penalty();
  if (message.has_frequency_penalty()) params.frequency_penalty = message.frequency_penalty();
  if (message.has_presence_penalty()) params.presence_penalty = message.presence_penalty();
  if (message.has_seed()) params.seed = message.seed();
  for (const auto& [token, bias] : message.logit_bias())
    params.logit_bias.emplace_back(token, bias);
  if (message.has_min_tokens()) params.min_tokens = message.min_tokens();
  params.ignore_eos = message.ignore_eos();
  params.stop.assign(message.stop().begin(), message.stop().end());
  params.stop_token_ids.assign(message.stop_token_ids().begin(), message.stop_token_ids().end());
  params.include_stop_str_in_output = message.include_stop_str_in_output();
  if (message.has_skip_special_tokens()) params.skip_special_tokens = message.skip_special_tokens();
  if (message.has_prompt_logprobs()) params.num_prompt_logprobs = message.prompt_logprobs();
  params.priority = message.priority();
  return params;
}

ChatMessage ToApi(const v1::ChatMessage& message) {
  ChatMessage result;
  result.role = message.role();
  result.content = message.content();
  if (message.has_name()) result.extra["name"] = message.name();
  if (message.has_tool_call_id()) result.extra["tool_call_id"] = message.tool_call_id();
  for (const Struct& call : message.tool_calls())
    result.extra["tool_calls"].push_back(ToJson(call));
  return result;
}

template <typename Messages>
std::vector<ChatMessage> ToApiMessages(const Messages& messages) {
  std::vector<ChatMessage> result;
  result.reserve(messages.size());
  for (const v1::ChatMessage& message : messages) result.push_back(ToApi(message));
  return result;
}

}  // namespace

StatusOr<CompletionRequest> ToApi(const v1::CreateCompletionRequest& message) {
  CompletionRequest request;
  GLOAM_ASSIGN_OR_RETURN(request.params, ToParams(message));
  request.model = message.model();
  for (int i = 0; i < message.prompt_size(); ++i) {
    const v1::Prompt& prompt = message.prompt(i);
    switch (prompt.input_case()) {
      case v1::Prompt::kText:
        request.prompts.emplace_back(prompt.text());
        break;
      case v1::Prompt::kTokens:
        request.prompts.emplace_back(
            std::vector<int64_t>(prompt.tokens().ids().begin(), prompt.tokens().ids().end()));
        break;
      case v1::Prompt::INPUT_NOT_SET:
        return InvalidField(fmt::format("prompt[{}]", i), "prompt[{}] needs text or tokens", i);
    }
  }
  if (message.has_suffix()) request.suffix = message.suffix();
  request.echo = message.echo();
  if (message.has_best_of()) request.params.best_of = message.best_of();
  if (message.has_max_tokens()) request.params.max_tokens = message.max_tokens();
  if (message.has_logprobs()) request.params.num_logprobs = message.logprobs();
  request.stream.include_usage = message.stream_options().include_usage();
  return request;
}

StatusOr<ChatCompletionRequest> ToApi(const v1::CreateChatCompletionRequest& message) {
  ChatCompletionRequest request;
  GLOAM_ASSIGN_OR_RETURN(request.params, ToParams(message));
  request.model = message.model();
  request.messages = ToApiMessages(message.messages());
  for (const Struct& tool : message.tools()) request.tools.push_back(ToJson(tool));
  if (message.has_add_generation_prompt()) {
    request.add_generation_prompt = message.add_generation_prompt();
  }
  request.continue_final_message = message.continue_final_message();
  if (message.has_chat_template_kwargs()) {
    request.chat_template_kwargs = ToJson(message.chat_template_kwargs());
  }
  request.params.max_tokens_field = "max_completion_tokens";
  if (message.has_max_completion_tokens()) {
    request.params.max_tokens = message.max_completion_tokens();
  }
  request.params.logprobs_field = "top_logprobs";
  if (message.logprobs()) {
    request.params.num_logprobs = message.top_logprobs();
  } else if (message.has_top_logprobs()) {
    return InvalidField("top_logprobs", "top_logprobs needs logprobs to be true");
  }
  request.stream.include_usage = message.stream_options().include_usage();
  return request;
}

StatusOr<TokenizeRequest> ToApi(const v1::TokenizeRequest& message) {
  TokenizeRequest request;
  request.model = message.model();
  switch (message.input_case()) {
    case v1::TokenizeRequest::kPrompt:
      request.input = message.prompt();
      break;
    case v1::TokenizeRequest::kMessages:
      request.input = ToApiMessages(message.messages().messages());
      break;
    case v1::TokenizeRequest::INPUT_NOT_SET:
      return InvalidField("prompt", "prompt or messages is required");
  }
  if (message.has_add_special_tokens()) request.add_special_tokens = message.add_special_tokens();
  if (message.has_add_generation_prompt()) {
    request.add_generation_prompt = message.add_generation_prompt();
  }
  return request;
}

StatusOr<DetokenizeRequest> ToApi(const v1::DetokenizeRequest& message) {
  DetokenizeRequest request;
  request.model = message.model();
  request.tokens.assign(message.tokens().begin(), message.tokens().end());
  return request;
}

Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer readable = bytes;  // shares the bytes; deserialising empties it
  const grpc::Status status =
      grpc::GenericDeserialize<grpc::ProtoBufferReader, google::protobuf::Message>(&readable,
                                                                                   message);
  if (!status.ok()) {
    return InvalidArgument("the request is not a valid {} message, or a string of it is not UTF-8",
                           message->GetTypeName());
  }
  return OkStatus();
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  grpc::ByteBuffer bytes;
  bool own_buffer = false;
  const grpc::Status status =
      grpc::GenericSerialize<grpc::ProtoBufferWriter, google::protobuf::Message>(message, &bytes,
                                                                                 &own_buffer);
  GLOAM_CHECK(status.ok());
  return bytes;
}

}  // namespace gloam
