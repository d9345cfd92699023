#include "server/openai/requests.h"

#include <string>

#include "catch2/catch.hpp"
#include "server/api_error.h"

namespace gloam {
namespace {

TEST_CASE("A completion request with every field") {
  const auto request = ParseCompletionRequest(R"({
    "model": "m", "prompt": "hi", "suffix": null, "echo": true, "best_of": 3, "n": 2,
    "max_tokens": 7, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 40,
    "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": -0.2, "seed": -5,
    "stop": ["a", "b"], "stop_token_ids": [1, 2], "logit_bias": {"5": -100, "6": 1.5},
    "include_stop_str_in_output": true, "ignore_eos": true, "skip_special_tokens": false,
    "logprobs": 4, "prompt_logprobs": 1, "priority": -3, "sparsity": "twilight",
    "sparsity_decode_prompt_tokens": 5, "stream": true,
    "stream_options": {"include_usage": true}, "user": "u", "metadata": {}, "store": false,
    "service_tier": "auto", "unheard_of": [1]})");
  REQUIRE(request.ok());
  CHECK(request->model == "m");
  REQUIRE(request->prompts.size() == 1);
  CHECK(std::get<std::string>(request->prompts[0]) == "hi");
  CHECK_FALSE(request->suffix);
  CHECK(request->echo);
  const GenerationParams& p = request->params;
  CHECK(p.best_of == 3);
  CHECK(p.n == 2);
  CHECK(p.max_tokens == 7);
  CHECK(p.min_tokens == 1);
  CHECK(p.temperature == 0.5);
  CHECK(p.top_p == 0.9);
  CHECK(p.min_p == 0.1);
  CHECK(p.top_k == 40);
  CHECK(p.repetition_penalty == 1.1);
  CHECK(p.frequency_penalty == 0.2);
  CHECK(p.presence_penalty == -0.2);
  CHECK(p.seed == -5);
  CHECK(p.stop == std::vector<std::string>{"a", "b"});
  CHECK(p.stop_token_ids == std::vector<int64_t>{1, 2});
  CHECK(p.logit_bias == std::vector<std::pair<int64_t, double>>{{5, -100}, {6, 1.5}});
  CHECK(p.include_stop_str_in_output);
  CHECK(p.ignore_eos);
  CHECK_FALSE(p.skip_special_tokens);
  CHECK(p.num_logprobs == 4);
  CHECK(p.num_prompt_logprobs == 1);
  CHECK(p.priority == -3);
  CHECK(p.sparsity.policy == "twilight");
  CHECK(p.num_decoded_prompt_tokens == 5);
  CHECK(request->stream.stream);
  CHECK(request->stream.include_usage);
}

TEST_CASE("The forms of sparsity") {
  const auto sparsity = [](const std::string& json) {
    const auto request = ParseCompletionRequest(R"({"prompt": "x", "sparsity": )" + json + "}");
    REQUIRE(request.ok());
    return request->params.sparsity;
  };
  CHECK_FALSE(sparsity("null").policy);
  CHECK(sparsity("\"quest\"").policy == "quest");
  CHECK(sparsity("\"quest\"").body.is_null());
  const SparsityRequest changed =
      sparsity(R"({"policy": "a", "p": 0.5, "token_budget": 64, "report_true_mass": true})");
  CHECK(changed.policy == "a");
  CHECK(changed.overrides.p == 0.5);
  CHECK(changed.overrides.token_budget == 64);
  CHECK(changed.overrides.report_true_mass == true);
  CHECK(changed.body.is_null());
  CHECK_FALSE(sparsity(R"({"p": 0.5})").policy);
  CHECK(sparsity(R"({"p": 0.5})").overrides.p == 0.5);
  for (const char* whole : {"{}", R"({"selector": {"type": "none"}})"}) {
    const SparsityRequest own = sparsity(whole);
    CHECK(own.body == nlohmann::ordered_json::parse(whole));
    CHECK_FALSE(own.policy);
    CHECK(own.overrides.empty());
  }
}

TEST_CASE("The four shapes of a prompt") {
  const auto prompts = [](const std::string& json) {
    const auto request = ParseCompletionRequest("{\"prompt\": " + json + "}");
    REQUIRE(request.ok());
    return request->prompts;
  };
  using Ids = std::vector<int64_t>;
  CHECK(prompts("\"x\"") == std::vector<PromptInput>{std::string("x")});
  CHECK(prompts("[\"x\", \"y\"]") == std::vector<PromptInput>{std::string("x"), std::string("y")});
  CHECK(prompts("[1, 2.0]") == std::vector<PromptInput>{Ids{1, 2}});
  CHECK(prompts("[[1], [2, 3]]") == std::vector<PromptInput>{Ids{1}, Ids{2, 3}});
  CHECK(prompts("[]").empty());
}

TEST_CASE("A chat request: messages, parts, tools, log-probabilities") {
  const auto request = ParseChatCompletionRequest(R"({
    "messages": [
      {"role": "developer", "content": "be brief"},
      {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"},
                                                  {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
      {"role": "tool", "tool_call_id": "1", "content": "42"}],
    "tools": [{"type": "function"}], "tool_choice": "auto", "logprobs": true, "top_logprobs": 3,
    "max_tokens": 5, "max_completion_tokens": 6, "response_format": {"type": "text"},
    "add_generation_prompt": false, "continue_final_message": true,
    "chat_template_kwargs": {"enable_thinking": false}, "stop": "x"})");
  REQUIRE(request.ok());
  REQUIRE(request->messages.size() == 4);
  CHECK(request->messages[0].role == "developer");
  CHECK(request->messages[1].content == "a\nb");
  CHECK(request->messages[1].extra["name"] == "ann");
  CHECK(request->messages[2].content.empty());
  CHECK(request->messages[2].extra["tool_calls"][0]["function"]["arguments"]["x"] == 1);
  CHECK(request->messages[3].extra["tool_call_id"] == "1");
  CHECK(request->tools.size() == 1);
  CHECK(request->params.num_logprobs == 3);
  CHECK(request->params.max_tokens == 6);
  CHECK(request->params.max_tokens_field == "max_completion_tokens");
  CHECK_FALSE(request->add_generation_prompt);
  CHECK(request->continue_final_message);
  CHECK(request->chat_template_kwargs["enable_thinking"] == false);
  CHECK(request->params.stop == std::vector<std::string>{"x"});
}

TEST_CASE("tool_choice none keeps the tools from the template") {
  const auto request = ParseChatCompletionRequest(
      R"({"messages": [], "tools": [{"type": "function"}], "tool_choice": "none"})");
  REQUIRE(request.ok());
  CHECK(request->tools.is_null());
}

struct BadField {
  const char* fields;  // added to a valid body
  const char* param;
};

TEST_CASE("Faults of completion requests name their field") {
  const BadField cases[] = {
      {R"("model": 5)", "model"},
      {R"("prompt": 5)", "prompt"},
      {R"("prompt": {})", "prompt"},
      {R"("prompt": [1, "x"])", "prompt"},
      {R"("prompt": ["x", 1])", "prompt[1]"},
      {R"("prompt": [[1], [1.5]])", "prompt[1]"},
      {R"("prompt": "x", "max_tokens": "5")", "max_tokens"},
      {R"("prompt": "x", "max_tokens": 1.5)", "max_tokens"},
      {R"("prompt": "x", "max_tokens": 99999999999999999999)", "max_tokens"},
      {R"("prompt": "x", "max_tokens": true)", "max_tokens"},
      {R"("prompt": "x", "n": "1")", "n"},
      {R"("prompt": "x", "best_of": [])", "best_of"},
      {R"("prompt": "x", "logprobs": true)", "logprobs"},
      {R"("prompt": "x", "temperature": "hot")", "temperature"},
      {R"("prompt": "x", "top_p": [0.5])", "top_p"},
      {R"("prompt": "x", "top_k": 0.5)", "top_k"},
      {R"("prompt": "x", "seed": 18446744073709551615)", "seed"},
      {R"("prompt": "x", "stop": 5)", "stop"},
      {R"("prompt": "x", "stop": ["a", 5])", "stop"},
      {R"("prompt": "x", "stop_token_ids": [1, "2"])", "stop_token_ids"},
      {R"("prompt": "x", "logit_bias": [1])", "logit_bias"},
      {R"("prompt": "x", "logit_bias": {"a": 1})", "logit_bias"},
      {R"("prompt": "x", "logit_bias": {"1 ": 1})", "logit_bias"},
      {R"("prompt": "x", "logit_bias": {"1": "1"})", "logit_bias"},
      {R"("prompt": "x", "echo": 1)", "echo"},
      {R"("prompt": "x", "stream": "yes")", "stream"},
      {R"("prompt": "x", "stream_options": {})", "stream_options"},
      {R"("prompt": "x", "stream": true, "stream_options": [])", "stream_options"},
      {R"("prompt": "x", "stream": true, "stream_options": {"include_usage": 1})",
       "stream_options.include_usage"},
      {R"("prompt": "x", "response_format": {"type": "json_object"})", "response_format"},
      {R"("prompt": "x", "response_format": "text")", "response_format"},
      {R"("prompt": "x", "guided_regex": "a+")", "guided_regex"},
      {R"("prompt": "x", "sparsity": 5)", "sparsity"},
      {R"("prompt": "x", "sparsity": ["dense"])", "sparsity"},
      {R"("prompt": "x", "sparsity": {"policy": 5})", "sparsity.policy"},
      {R"("prompt": "x", "sparsity": {"p": "0.9"})", "sparsity.p"},
      {R"("prompt": "x", "sparsity": {"token_budget": 0.5})", "sparsity.token_budget"},
      {R"("prompt": "x", "sparsity": {"policy": "a", "report_true_mass": 1})",
       "sparsity.report_true_mass"},
      {R"("prompt": "x", "sparsity": {"policy": "a", "sink_tokens": 1})", "sparsity.sink_tokens"},
      {R"("prompt": "x", "sparsity_decode_prompt_tokens": "1")", "sparsity_decode_prompt_tokens"},
      {R"("prompt": "x", "store": true)", "store"},
      {R"("prompt": "x", "chat_template": "{{ messages }}")", "chat_template"},
      {R"("prompt": "x", "use_beam_search": true)", "use_beam_search"},
      {R"("other": 1)", "prompt"},
  };
  for (const BadField& bad : cases) {
    INFO(bad.fields);
    const auto request = ParseCompletionRequest("{" + std::string(bad.fields) + "}");
    REQUIRE_FALSE(request.ok());
    CHECK(request.status().code() == StatusCode::kInvalidArgument);
    CHECK(ParamOf(request.status()) == bad.param);
  }
}

TEST_CASE("Faults of chat requests name their field") {
  const std::string user = R"("messages": [{"role": "user", "content": "x"}])";
  const std::pair<std::string, std::string> cases[] = {
      {R"("model": "m")", "messages"},
      {R"("messages": "x")", "messages"},
      {R"("messages": ["x"])", "messages[0]"},
      {R"("messages": [{"content": "x"}])", "messages[0].role"},
      {R"("messages": [{"role": 1, "content": "x"}])", "messages[0].role"},
      {R"("messages": [{"role": "user"}])", "messages[0].content"},
      {R"("messages": [{"role": "user", "content": 5}])", "messages[0].content"},
      {R"("messages": [{"role": "user", "content": ["x"]}])", "messages[0].content[0]"},
      {R"("messages": [{"role": "user", "content": [{"type": "text"}]}])",
       "messages[0].content[0].text"},
      {R"("messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
          {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])",
       "messages[0].content[1].type"},
      {R"("messages": [{"role": "assistant", "tool_calls": {}}])", "messages[0].tool_calls"},
      {user + R"(, "top_logprobs": 2)", "top_logprobs"},
      {user + R"(, "logprobs": 2)", "logprobs"},
      {user + R"(, "tools": {})", "tools"},
      {user + R"(, "tool_choice": "required")", "tool_choice"},
      {user + R"(, "tool_choice": {"type": "function"})", "tool_choice"},
      {user + R"(, "functions": [])", "functions"},
      {user + R"(, "modalities": ["text", "audio"])", "modalities"},
      {user + R"(, "audio": {})", "audio"},
      {user + R"(, "chat_template_kwargs": [])", "chat_template_kwargs"},
      {user + R"(, "chat_template": "x")", "chat_template"},
      {user + R"(, "max_completion_tokens": "x")", "max_completion_tokens"},
      {user + R"(, "response_format": {"type": "json_schema", "json_schema": {}})",
       "response_format"},
  };
  for (const auto& [fields, param] : cases) {
    INFO(fields);
    const auto request = ParseChatCompletionRequest("{" + fields + "}");
    REQUIRE_FALSE(request.ok());
    CHECK(ParamOf(request.status()) == param);
  }
}

TEST_CASE("Bodies that are no objects") {
  for (const char* body :
       {"[]", "5", "\"x\"", "null", "", "{\"prompt\": \"x\", \"prompt\": \"y\"}"}) {
    CHECK_FALSE(ParseCompletionRequest(body).ok());
    CHECK_FALSE(ParseChatCompletionRequest(body).ok());
    CHECK_FALSE(ParseTokenizeRequest(body).ok());
    CHECK_FALSE(ParseDetokenizeRequest(body).ok());
  }
}

TEST_CASE("Tokenize and detokenize requests") {
  const auto text = ParseTokenizeRequest(R"({"prompt": "x", "add_special_tokens": false})");
  REQUIRE(text.ok());
  CHECK(std::get<std::string>(text->input) == "x");
  CHECK_FALSE(text->add_special_tokens);
  const auto chat = ParseTokenizeRequest(R"({"messages": [{"role": "user", "content": "x"}]})");
  REQUIRE(chat.ok());
  CHECK(std::get<std::vector<ChatMessage>>(chat->input).size() == 1);
  CHECK(ParamOf(ParseTokenizeRequest("{}").status()) == "prompt");
  CHECK(ParamOf(ParseTokenizeRequest(R"({"prompt": 1})").status()) == "prompt");
  const auto tokens = ParseDetokenizeRequest(R"({"tokens": [1, 2]})");
  REQUIRE(tokens.ok());
  CHECK(tokens->tokens == std::vector<int64_t>{1, 2});
  CHECK(ParamOf(ParseDetokenizeRequest("{}").status()) == "tokens");
  CHECK(ParamOf(ParseDetokenizeRequest(R"({"tokens": ["a"]})").status()) == "tokens");
}

}  // namespace
}  // namespace gloam
