#include "server/generation_service.h"

#include <cmath>
#include <limits>
#include <string>

#include "catch2/catch.hpp"
#include "fake_engine.h"
#include "server/api_error.h"
#include "server/sampling_limits.h"

namespace gloam {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr char kTemplate[] =
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}";

struct Fixture {
  explicit Fixture(GenerationDefaults defaults = {}) {
    auto parsed = ChatTemplate::Parse(kTemplate, "", "<eos>");
    REQUIRE(parsed.ok());
    chat_template = *std::move(parsed);
    service = std::make_unique<GenerationService>(
        GenerationServiceOptions{{"m", "alias"}, BuiltinPolicyRegistry()}, engine, tokenizer,
        chat_template.get(), defaults);
  }

  FakeEngine engine;  // of 1024 tokens of context
  ByteTokenizer tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<GenerationService> service;
};

CompletionRequest Completion(PromptInput prompt = std::string("hi")) {
  CompletionRequest request;
  request.model = "m";
  request.prompts = {std::move(prompt)};
  return request;
}

ChatCompletionRequest Chat() {
  ChatCompletionRequest request;
  request.messages = {{"user", "hi", nullptr}};
  return request;
}

std::string Text(const std::vector<int32_t>& tokens) { return {tokens.begin(), tokens.end()}; }

TEST_CASE("A plain completion takes OpenAI's defaults") {
  Fixture f;
  const auto prepared = f.service->Prepare(Completion());
  REQUIRE(prepared.ok());
  CHECK(prepared->id.rfind("cmpl-", 0) == 0);
  REQUIRE(prepared->requests.size() == 1);
  const Request& request = prepared->requests[0];
  CHECK(Text(request.prompt) == "hi");
  CHECK(request.n == 1);
  CHECK(request.sampling.max_tokens == 16);
  CHECK(request.sampling.temperature == 1.0f);
  CHECK(request.sampling.top_p == 1.0f);
  CHECK(request.sampling.top_k == 0);
  CHECK(request.sampling.num_logprobs == -1);
}

TEST_CASE("Request beats the model's defaults, which beat OpenAI's") {
  GenerationDefaults defaults;
  defaults.temperature = 0.25f;
  defaults.top_k = 20;
  defaults.top_p = 0.5f;
  Fixture f(defaults);
  CompletionRequest request = Completion();
  request.params.top_k = -1;
  request.params.top_p = 0.75;
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  CHECK(prepared->requests[0].sampling.temperature == 0.25f);
  CHECK(prepared->requests[0].sampling.top_k == 0);
  CHECK(prepared->requests[0].sampling.top_p == 0.75f);
}

TEST_CASE("A chat answer may fill the context, developer means system") {
  Fixture f;
  ChatCompletionRequest request = Chat();
  request.messages.insert(request.messages.begin(), {"developer", "be brief", nullptr});
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  const std::string prompt = "<system>be brief<user>hi<assistant>";
  CHECK(prepared->id.rfind("chatcmpl-", 0) == 0);
  CHECK(Text(prepared->requests[0].prompt) == prompt);
  CHECK(prepared->requests[0].sampling.max_tokens == 1024 - static_cast<int>(prompt.size()));
}

TEST_CASE("Several prompts, n, best_of and echo") {
  Fixture f;
  CompletionRequest request = Completion();
  request.prompts = {std::string("one"), std::vector<int64_t>{116, 119, 111}};
  request.echo = true;
  request.params.n = 2;
  request.params.best_of = 3;
  request.params.num_logprobs = 0;
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  REQUIRE(prepared->requests.size() == 2);
  CHECK(prepared->num_choices_per_prompt == 2);
  CHECK(prepared->requests[1].n == 3);
  CHECK(prepared->requests[1].sampling.num_prompt_logprobs == 0);
  CHECK(prepared->num_prompt_logprobs == -1);
  CHECK(prepared->echo_texts == std::vector<std::string>{"one", "two"});
  CHECK(prepared->requests[0].id != prepared->requests[1].id);
}

TEST_CASE("max_tokens 0 scores a prompt, only with echo") {
  Fixture f;
  CompletionRequest request = Completion();
  request.params.max_tokens = 0;
  CHECK(ParamOf(f.service->Prepare(request).status()) == "max_tokens");
  request.echo = true;
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  CHECK(prepared->prompt_only);
  CHECK(prepared->requests[0].sampling.max_tokens == 1);
}

TEST_CASE("Fields out of range name themselves") {
  Fixture f;
  using Set = void (*)(GenerationParams&);
  const std::pair<const char*, Set> cases[] = {
      {"n", [](GenerationParams& p) { p.n = 0; }},
      {"n", [](GenerationParams& p) { p.n = 129; }},
      {"best_of", [](GenerationParams& p) { p.best_of = 0; }},
      {"best_of", [](GenerationParams& p) { p.n = 3, p.best_of = 2; }},
      {"temperature", [](GenerationParams& p) { p.temperature = -0.1; }},
      {"temperature", [](GenerationParams& p) { p.temperature = 2.1; }},
      {"temperature", [](GenerationParams& p) { p.temperature = kNan; }},
      {"top_p", [](GenerationParams& p) { p.top_p = 0; }},
      {"top_p", [](GenerationParams& p) { p.top_p = 1.01; }},
      {"min_p", [](GenerationParams& p) { p.min_p = -0.1; }},
      {"top_k", [](GenerationParams& p) { p.top_k = -2; }},
      {"top_k", [](GenerationParams& p) { p.top_k = int64_t{1} << 40; }},
      {"repetition_penalty", [](GenerationParams& p) { p.repetition_penalty = 0; }},
      {"frequency_penalty", [](GenerationParams& p) { p.frequency_penalty = 2.5; }},
      {"presence_penalty", [](GenerationParams& p) { p.presence_penalty = -2.5; }},
      {"max_tokens", [](GenerationParams& p) { p.max_tokens = -1; }},
      {"min_tokens", [](GenerationParams& p) { p.min_tokens = -1; }},
      {"min_tokens", [](GenerationParams& p) { p.min_tokens = 5, p.max_tokens = 4; }},
      {"logprobs", [](GenerationParams& p) { p.num_logprobs = 21; }},
      {"prompt_logprobs", [](GenerationParams& p) { p.num_prompt_logprobs = -1; }},
      {"priority", [](GenerationParams& p) { p.priority = int64_t{1} << 40; }},
      {"stop",
       [](GenerationParams& p) {
         p.stop = {"a", "b", "c", "d", "e"};
       }},
      {"stop", [](GenerationParams& p) { p.stop = {""}; }},
      {"stop", [](GenerationParams& p) { p.stop = {std::string(1 << 20, 'a')}; }},
      {"stop_token_ids", [](GenerationParams& p) { p.stop_token_ids = {257}; }},
      {"stop_token_ids", [](GenerationParams& p) { p.stop_token_ids = {-1}; }},
      {"stop_token_ids", [](GenerationParams& p) { p.stop_token_ids.assign(1000000, 1); }},
      {"logit_bias",
       [](GenerationParams& p) {
         p.logit_bias = {{257, 1}};
       }},
      {"logit_bias",
       [](GenerationParams& p) {
         p.logit_bias = {{1, 100.5}};
       }},
      {"logit_bias",
       [](GenerationParams& p) {
         p.logit_bias = {{1, kNan}};
       }},
      {"logit_bias",
       [](GenerationParams& p) {
         p.logit_bias.assign(1000000, {1, 1});
       }},
  };
  for (const auto& [param, set] : cases) {
    CompletionRequest request = Completion();
    set(request.params);
    const Status status = f.service->Prepare(request).status();
    INFO(param << ": " << MessageOf(status));
    CHECK(HttpStatusOf(status) == 400);
    CHECK(ParamOf(status) == param);
    CHECK(MessageOf(status).find(param) != std::string::npos);
  }
}

TEST_CASE("The edges of every range are allowed") {
  Fixture f;
  CompletionRequest request = Completion();
  GenerationParams& p = request.params;
  p.n = 128;
  p.temperature = 2;
  p.top_p = 1;
  p.min_p = 1;
  p.top_k = 0;
  p.repetition_penalty = 2;
  p.frequency_penalty = -2;
  p.presence_penalty = 2;
  p.max_tokens = 1022;
  p.min_tokens = 1022;
  p.num_logprobs = 20;
  p.num_prompt_logprobs = 0;
  p.stop = {"a", "b", "c", std::string(kMaxStopBytes, 'd')};
  p.stop_token_ids = {0, 256};
  p.logit_bias = {{0, -100}, {256, 100}};
  CHECK(f.service->Prepare(request).ok());
}

TEST_CASE("Prompts that are empty or hold no token of the vocabulary") {
  Fixture f;
  using Ids = std::vector<int64_t>;
  for (const PromptInput& prompt : {PromptInput(std::string()), PromptInput(Ids{}),
                                    PromptInput(Ids{-1}), PromptInput(Ids{257})}) {
    CHECK(ParamOf(f.service->Prepare(Completion(prompt)).status()) == "prompt");
  }
  CompletionRequest request = Completion();
  request.prompts.clear();
  CHECK(ParamOf(f.service->Prepare(request).status()) == "prompt");
  request.prompts = {std::string("a"), std::string()};
  CHECK(ParamOf(f.service->Prepare(request).status()) == "prompt[1]");
  request.prompts.assign(3000, std::string("a"));
  CHECK(ParamOf(f.service->Prepare(request).status()) == "prompt");
}

TEST_CASE("Prompt and answer must fit the context") {
  Fixture f;
  const auto fault = [&](const CompletionRequest& request) {
    const Status status = f.service->Prepare(request).status();
    CHECK(HttpStatusOf(status) == 400);
    CHECK(ErrorCodeOf(status) == "context_length_exceeded");
    CHECK(MessageOf(status).find("1024") != std::string::npos);
    return ParamOf(status);
  };
  CHECK(fault(Completion(std::string(1024, 'a'))) == "prompt");
  CHECK(fault(Completion(std::string(10 << 20, 'a'))) == "prompt");  // judged by its bytes
  CHECK(fault(Completion(std::vector<int64_t>(5000, 1))) == "prompt");
  CompletionRequest request = Completion(std::string(1000, 'a'));
  request.params.max_tokens = 25;
  CHECK(fault(request) == "max_tokens");
  request.params.max_tokens = 24;
  CHECK(f.service->Prepare(request).ok());
  request.params.max_tokens.reset();  // OpenAI's 16 shrink to what is left
  request.prompts = {std::string(1020, 'a')};
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  CHECK(prepared->requests[0].sampling.max_tokens == 4);

  ChatCompletionRequest chat = Chat();
  chat.messages[0].content = std::string(2000, 'a');
  CHECK(ErrorCodeOf(f.service->Prepare(chat).status()) == "context_length_exceeded");
  chat.messages[0].content = std::string(10 << 20, 'a');
  CHECK(ErrorCodeOf(f.service->Prepare(chat).status()) == "context_length_exceeded");
}

TEST_CASE("What completions refuse") {
  Fixture f;
  CompletionRequest request = Completion();
  request.suffix = "end";
  CHECK(ParamOf(f.service->Prepare(request).status()) == "suffix");
  request = Completion();
  request.stream.stream = true;
  request.params.num_prompt_logprobs = 1;
  CHECK(ParamOf(f.service->Prepare(request).status()) == "prompt_logprobs");
  request = Completion();
  request.stream.stream = true;
  request.params.best_of = 2;
  CHECK(ParamOf(f.service->Prepare(request).status()) == "best_of");
}

TEST_CASE("What chats refuse") {
  Fixture f;
  ChatCompletionRequest request = Chat();
  request.messages.clear();
  CHECK(ParamOf(f.service->Prepare(request).status()) == "messages");
  request = Chat();
  request.messages.push_back({"boss", "x", nullptr});
  CHECK(ParamOf(f.service->Prepare(request).status()) == "messages[1].role");
  request = Chat();
  request.params.max_tokens = 0;
  request.params.max_tokens_field = "max_completion_tokens";
  CHECK(ParamOf(f.service->Prepare(request).status()) == "max_completion_tokens");
  request = Chat();
  request.continue_final_message = true;
  CHECK(ParamOf(f.service->Prepare(request).status()) == "continue_final_message");
  request = Chat();
  request.chat_template_kwargs = {{"chat_template", "x"}};
  CHECK(ParamOf(f.service->Prepare(request).status()) == "chat_template_kwargs.chat_template");

  GenerationService without({{"m"}, nullptr}, f.engine, f.tokenizer, nullptr, {});
  CHECK(ParamOf(without.Prepare(Chat()).status()) == "messages");
}

TEST_CASE("A request's sparsity becomes a policy") {
  Fixture f;
  const auto policy_of = [&](const SparsityRequest& sparsity) {
    CompletionRequest request = Completion();
    request.params.sparsity = sparsity;
    const auto prepared = f.service->Prepare(request);
    REQUIRE(prepared.ok());
    return prepared->requests[0].sparsity;
  };
  CHECK(policy_of({}) == nullptr);
  CHECK(policy_of({.policy = "dense"}) == nullptr);
  CHECK(policy_of({.policy = "twilight"}) == *f.service->policies().Find("twilight"));
  const auto changed = policy_of({.policy = "quest_twi", .overrides = {.p = 0.5}});
  CHECK(changed->name == "quest_twi");
  CHECK(changed->pruner.threshold == 0.5f);
  SparsityRequest own;
  own.body = {{"selector", {{"type", "quest"}, {"token_budget", 64}}}, {"sink_tokens", 3}};
  CHECK(policy_of(own)->name.empty());
  CHECK(policy_of(own)->sink_tokens == 3);

  ChatCompletionRequest chat = Chat();
  chat.params.sparsity.policy = "twilight";
  const auto prepared = f.service->Prepare(chat);
  REQUIRE(prepared.ok());
  CHECK(prepared->requests[0].sparsity->name == "twilight");
}

TEST_CASE("All prompts of a request share its policy") {
  Fixture f;
  CompletionRequest request = Completion();
  request.prompts.emplace_back(std::string("there"));
  request.params.sparsity = {.policy = "quest_twi", .overrides = {.p = 0.5}};
  const auto prepared = f.service->Prepare(request);
  REQUIRE(prepared.ok());
  CHECK(prepared->requests[0].sparsity == prepared->requests[1].sparsity);
}

TEST_CASE("Faults of a request's sparsity name the key") {
  Fixture f;
  const auto fault_of = [&](const SparsityRequest& sparsity) {
    CompletionRequest request = Completion();
    request.params.sparsity = sparsity;
    const Status status = f.service->Prepare(request).status();
    CHECK(HttpStatusOf(status) == 400);
    CHECK(MessageOf(status).rfind(ParamOf(status), 0) == 0);  // the message begins with the field
    return ParamOf(status);
  };
  const auto fault_of_body = [&](const char* text) {
    SparsityRequest sparsity;
    sparsity.body = nlohmann::ordered_json::parse(text);
    return fault_of(sparsity);
  };
  CHECK(fault_of({.policy = "magic"}) == "sparsity.policy");
  CHECK(fault_of({.policy = ""}) == "sparsity.policy");
  CHECK(fault_of({.policy = "ds_twi"}) == "sparsity.selector.config_path");
  CHECK(fault_of({.overrides = {.p = 0.9}}) == "sparsity.p");  // the default is dense
  CHECK(fault_of({.policy = "quest_twi", .overrides = {.p = 1.1}}) == "sparsity.p");
  CHECK(fault_of({.policy = "quest_twi", .overrides = {.token_budget = 0}}) ==
        "sparsity.token_budget");
  CHECK(fault_of_body(R"({"selecter": {}})") == "sparsity.selecter");
  CHECK(fault_of_body(R"({"selector": {"type": "quest", "token_budget": 0}})") ==
        "sparsity.selector.token_budget");
  CHECK(fault_of_body(R"({"weight_pruner": {"type": "top_p", "threshold": 2}})") ==
        "sparsity.weight_pruner.threshold");
  CHECK(fault_of_body(R"({"weight_estimator": {"type": "max_quant", "quant_bit": 4}})") ==
        "sparsity.weight_estimator.type");  // no enabled policy needs its sidecar
  CHECK(fault_of_body(R"({"weight_estimator": {"type": "block_quant", "quant_bit": 8}})") ==
        "sparsity.weight_estimator.quant_bit");
  CHECK(fault_of_body(R"({"selector": {"type": "ds", "r": 4, "token_budget": 64,
                                       "config_path": "/etc/passwd"}})") ==
        "sparsity.selector.config_path");
}

TEST_CASE("The last prompt tokens that run as decode steps are fewer than the prompt's") {
  Fixture f;
  CompletionRequest request = Completion();  // of two tokens
  CHECK(f.service->Prepare(request)->requests[0].num_decoded_prompt_tokens == 0);
  request.params.num_decoded_prompt_tokens = 1;
  CHECK(f.service->Prepare(request)->requests[0].num_decoded_prompt_tokens == 1);
  for (const int64_t wrong : {int64_t{2}, int64_t{-1}, int64_t{1} << 40}) {
    request.params.num_decoded_prompt_tokens = wrong;
    CHECK(ParamOf(f.service->Prepare(request).status()) == "sparsity_decode_prompt_tokens");
  }
}

TEST_CASE("Models by name") {
  Fixture f;
  CHECK(f.service->CheckModel("m").ok());
  CHECK(f.service->CheckModel("alias").ok());
  CHECK(f.service->CheckModel("").ok());
  const Status status = f.service->CheckModel("gpt-4");
  CHECK(HttpStatusOf(status) == 404);
  CHECK(ErrorCodeOf(status) == "model_not_found");
  CHECK(ParamOf(status) == "model");
}

TEST_CASE("Tokenize and detokenize") {
  Fixture f;
  TokenizeRequest tokenize;
  tokenize.input = std::string("ab");
  CHECK(*f.service->Tokenize(tokenize) == std::vector<int32_t>{97, 98});
  tokenize.input = std::vector<ChatMessage>{{"user", "x", nullptr}};
  CHECK(Text(*f.service->Tokenize(tokenize)) == "<user>x<assistant>");
  CHECK(*f.service->Detokenize({"m", {97, 98}}) == "ab");
  CHECK(ParamOf(f.service->Detokenize({"m", {257}}).status()) == "tokens");
}

}  // namespace
}  // namespace gloam
