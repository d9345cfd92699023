// What the gRPC methods answer when all goes well.

#include "grpc_fixture.h"

namespace gloam {
namespace {

TEST_CASE("Create gives the whole answer, its usage and the request's id") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.set_temperature(0);
  request.set_max_tokens(7);
  request.set_seed(5);
  request.add_stop("x");
  (*request.mutable_logit_bias())[3] = -1.5f;
  CreateCall call(fixture, request);
  const RequestHandle handle = fixture.engine.WaitForRequest();
  const Request sent = fixture.engine.request(handle);
  CHECK(sent.prompt == std::vector<int32_t>{'h', 'i'});
  CHECK(sent.sampling.temperature == 0);
  CHECK(sent.sampling.max_tokens == 7);
  CHECK(sent.sampling.seed == 5u);
  CHECK(sent.sampling.stop == std::vector<std::string>{"x"});
  REQUIRE(sent.sampling.logit_bias.size() == 1);
  CHECK(sent.sampling.logit_bias[0] == std::pair<int32_t, float>(3, -1.5f));
  CHECK_FALSE(sent.deadline);

  REQUIRE(fixture.engine.Push(handle, "one "));
  REQUIRE(fixture.engine.Push(handle, "two"));
  fixture.engine.Finish(handle, FinishReason::kLength);
  fixture.engine.End(handle, {.prompt_tokens = 2, .completion_tokens = 7, .cached_tokens = 1});
  REQUIRE(call.Join().ok());
  CHECK(call.response.id().rfind("cmpl-", 0) == 0);
  CHECK(call.response.model() == "tiny");
  CHECK(call.response.created() > 1'600'000'000);
  REQUIRE(call.response.choices_size() == 1);
  CHECK(call.response.choices(0).text() == "one two");
  CHECK(call.response.choices(0).finish_reason() == v1::FINISH_REASON_LENGTH);
  CHECK_FALSE(call.response.choices(0).has_logprobs());
  CHECK(call.response.usage().prompt_tokens() == 2);
  CHECK(call.response.usage().completion_tokens() == 7);
  CHECK(call.response.usage().total_tokens() == 9);
  CHECK(call.response.usage().prompt_tokens_details().cached_tokens() == 1);
  CHECK(call.context.GetServerInitialMetadata().count("x-request-id") == 1);
  CHECK(fixture.engine.num_cancels(handle) == 0);
}

TEST_CASE("A sane x-request-id comes back, another one is replaced") {
  GrpcFixture fixture;
  auto stub = v1::Models::NewStub(fixture.channel);
  for (const auto& [sent, is_sane] :
       {std::pair<std::string, bool>{"trace-1.a:B_2", true}, {"two words", false}}) {
    grpc::ClientContext context;
    context.AddMetadata("x-request-id", sent);
    v1::ListModelsResponse response;
    REQUIRE(stub->List(&context, {}, &response).ok());
    const auto& initial = context.GetServerInitialMetadata();
    REQUIRE(initial.count("x-request-id") == 1);
    const auto id = initial.find("x-request-id")->second;
    CHECK((std::string(id.data(), id.size()) == sent) == is_sane);
  }
}

TEST_CASE("Choices of several prompts are numbered in order, streaming or not") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.add_prompt()->mutable_tokens()->add_ids('x');
  request.set_n(2);
  const auto answer = [&] {
    for (int prompt = 0; prompt < 2; ++prompt) {
      const RequestHandle handle = fixture.engine.WaitForRequest();
      for (int index : {1, 0}) {
        REQUIRE(fixture.engine.Push(handle, std::to_string(prompt) + std::to_string(index), index));
        fixture.engine.Finish(handle, FinishReason::kStop, index);
      }
      fixture.engine.End(handle, {.prompt_tokens = 1, .completion_tokens = 2});
    }
  };
  const std::vector<std::string> expected = {"00", "01", "10", "11"};

  CreateCall call(fixture, request);
  answer();
  REQUIRE(call.Join().ok());
  REQUIRE(call.response.choices_size() == 4);
  for (int i = 0; i < 4; ++i) {
    CHECK(call.response.choices(i).index() == i);
    CHECK(call.response.choices(i).text() == expected[i]);
  }
  CHECK(call.response.usage().prompt_tokens() == 2);
  CHECK(call.response.usage().completion_tokens() == 4);

  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, request);
  answer();
  std::vector<std::string> texts(4);
  v1::CompletionChunk chunk;
  while (reader->Read(&chunk)) {
    for (const auto& choice : chunk.choices()) texts.at(choice.index()) += choice.text();
  }
  REQUIRE(reader->Finish().ok());
  CHECK(texts == expected);
}

TEST_CASE("Sparsity: by name with changes, as a whole policy, and in the usage") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.mutable_sparsity()->set_policy("quest_twi");
  request.mutable_sparsity()->set_p(0.5);
  request.mutable_sparsity()->set_token_budget(64);
  request.set_sparsity_decode_prompt_tokens(1);
  {
    CreateCall call(fixture, request);
    const RequestHandle handle = fixture.engine.WaitForRequest();
    const Request sent = fixture.engine.request(handle);
    CHECK(sent.num_decoded_prompt_tokens == 1);
    CHECK(sent.sparsity->name == "quest_twi");
    CHECK(sent.sparsity->pruner.threshold == 0.5f);
    fixture.engine.Finish(handle);
    fixture.engine.End(handle, {.sparsity = SparsityUsage{.policy = "quest_twi",
                                                          .kept_tokens_per_head = 24.5,
                                                          .loaded_tokens_per_kv_head = 40,
                                                          .loaded_share = 0.25,
                                                          .sparse_steps = 3,
                                                          .bypassed_steps = 1,
                                                          .true_mass = 0.875}});
    REQUIRE(call.Join().ok());
    const v1::SparsityUsage& usage = call.response.usage().sparsity();
    CHECK(usage.policy() == "quest_twi");
    CHECK(usage.mean_kept_tokens_per_head() == 24.5);
    CHECK(usage.mean_loaded_tokens_per_kv_head() == 40);
    CHECK(usage.mean_loaded_share() == 0.25);
    CHECK(usage.sparse_steps() == 3);
    CHECK(usage.bypassed_steps() == 1);
    CHECK(usage.true_mass() == 0.875);
  }
  request.clear_sparsity();
  request.mutable_sparsity()->set_policy_json(R"({"sink_tokens": 4})");
  CreateCall call(fixture, request);
  const RequestHandle handle = fixture.engine.WaitForRequest();
  CHECK(fixture.engine.request(handle).sparsity->sink_tokens == 4);
  fixture.engine.Finish(handle);
  fixture.engine.End(handle);
  REQUIRE(call.Join().ok());
  CHECK_FALSE(call.response.usage().has_sparsity());
}

TEST_CASE("A stream keeps its order and ends with the finish reason and the usage") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.mutable_stream_options()->set_include_usage(true);
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, request);
  const RequestHandle handle = fixture.engine.WaitForRequest();
  std::string text;
  std::string id;
  v1::CompletionChunk chunk;
  for (int i = 0; i < 50; ++i) {
    REQUIRE(fixture.engine.Push(handle, std::to_string(i) + ","));
    if (i % 10 == 0) {  // read along for a part of the way
      REQUIRE(reader->Read(&chunk));
      CHECK(chunk.choices(0).finish_reason() == v1::FINISH_REASON_UNSPECIFIED);
      CHECK_FALSE(chunk.has_usage());
      id = chunk.id();
      text += chunk.choices(0).text();
    }
  }
  fixture.engine.Finish(handle);
  fixture.engine.End(handle, {.prompt_tokens = 2, .completion_tokens = 140});
  bool saw_finish = false;
  bool saw_usage = false;
  while (reader->Read(&chunk)) {
    CHECK(chunk.id() == id);
    for (const auto& choice : chunk.choices()) {
      CHECK_FALSE(saw_finish);
      text += choice.text();
      saw_finish = choice.finish_reason() == v1::FINISH_REASON_STOP;
    }
    CHECK_FALSE(saw_usage);
    if (chunk.has_usage()) {
      saw_usage = true;
      CHECK(saw_finish);
      CHECK(chunk.usage().total_tokens() == 142);
    }
  }
  REQUIRE(reader->Finish().ok());
  CHECK(saw_finish);
  CHECK(saw_usage);
  std::string expected;
  for (int i = 0; i < 50; ++i) expected += std::to_string(i) + ",";
  CHECK(text == expected);
  CHECK(fixture.engine.num_cancels(handle) == 0);
}

TEST_CASE("Completions' log-probabilities: parallel arrays, with the echoed prompt first") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.set_logprobs(2);
  request.set_echo(true);
  const auto answer = [&] {
    const RequestHandle handle = fixture.engine.WaitForRequest();
    fixture.engine.PushPromptLogprobs(handle);
    REQUIRE(fixture.engine.Push(handle, "\xC3\xA9"));  // a character of two tokens
    fixture.engine.Finish(handle);
    fixture.engine.End(handle);
  };
  const auto check = [](const v1::CompletionChoice& choice) {
    CHECK(choice.text() == "hi\xC3\xA9");
    const v1::CompletionLogprobs& logprobs = choice.logprobs();
    REQUIRE(logprobs.tokens_size() == 4);
    REQUIRE(logprobs.token_logprobs_size() == 4);
    REQUIRE(logprobs.top_logprobs_size() == 4);
    REQUIRE(logprobs.text_offset_size() == 4);
    CHECK(logprobs.tokens(0) == "h");
    CHECK(logprobs.tokens(2) == "bytes:\\xc3");
    CHECK(logprobs.top_logprobs(0).logprobs().empty());  // nothing predicts the first token
    CHECK(logprobs.token_logprobs(1) == -0.5f);
    REQUIRE(logprobs.top_logprobs(1).logprobs_size() == 2);
    CHECK(logprobs.top_logprobs(1).logprobs().at("j") == -1.5f);
    CHECK(logprobs.text_offset(1) == 1);
    CHECK(logprobs.text_offset(2) == 2);
  };

  CreateCall call(fixture, request);
  answer();
  REQUIRE(call.Join().ok());
  check(call.response.choices(0));

  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, request);
  answer();
  v1::CompletionChoice whole;
  v1::CompletionChunk chunk;
  while (reader->Read(&chunk)) {
    for (const auto& choice : chunk.choices()) {
      const std::string text = whole.text() + choice.text();
      whole.MergeFrom(choice);
      whole.set_text(text);
    }
  }
  REQUIRE(reader->Finish().ok());
  check(whole);
}

TEST_CASE("prompt_logprobs: of each prompt, at its first choice") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.set_prompt_logprobs(1);
  request.set_n(2);
  CreateCall call(fixture, request);
  const RequestHandle handle = fixture.engine.WaitForRequest();
  fixture.engine.PushPromptLogprobs(handle);
  for (int index : {0, 1}) fixture.engine.Finish(handle, FinishReason::kStop, index);
  fixture.engine.End(handle);
  REQUIRE(call.Join().ok());
  REQUIRE(call.response.choices_size() == 2);
  CHECK(call.response.choices(1).prompt_logprobs_size() == 0);
  const v1::CompletionChoice& choice = call.response.choices(0);
  REQUIRE(choice.prompt_logprobs_size() == 2);
  CHECK(choice.prompt_logprobs(0).token().token() == "h");
  CHECK(choice.prompt_logprobs(0).token().rank() == 0);
  CHECK(choice.prompt_logprobs(1).token().token_id() == 'i');
  REQUIRE(choice.prompt_logprobs(1).top_logprobs_size() == 1);
  CHECK(choice.prompt_logprobs(1).top_logprobs(0).logprob() == -0.5f);
}

TEST_CASE("Chat: the template's prompt, the message, its log-probabilities") {
  GrpcFixture fixture;
  v1::CreateChatCompletionRequest request;
  v1::ChatMessage* message = request.add_messages();
  message->set_role("user");
  message->set_content("hello");
  request.set_logprobs(true);
  request.set_top_logprobs(2);
  const auto answer = [&] {
    const RequestHandle handle = fixture.engine.WaitForRequest();
    const Request sent = fixture.engine.request(handle);
    CHECK(std::string(sent.prompt.begin(), sent.prompt.end()) == "user:hello;");
    REQUIRE(fixture.engine.Push(handle, "ok"));
    fixture.engine.Finish(handle);
    fixture.engine.End(handle);
  };
  const auto check_logprobs = [](const v1::ChatLogprobs& logprobs) {
    REQUIRE(logprobs.content_size() == 2);
    CHECK(logprobs.content(0).token().token() == "o");
    CHECK(logprobs.content(0).token().bytes() == "o");
    CHECK(logprobs.content(0).token().token_id() == 'o');
    CHECK(logprobs.content(0).token().logprob() == -0.5f);
    REQUIRE(logprobs.content(1).top_logprobs_size() == 2);
    CHECK(logprobs.content(1).top_logprobs(1).token() == "l");
  };
  auto stub = v1::ChatCompletions::NewStub(fixture.channel);

  v1::ChatCompletion response;
  std::thread engine(answer);
  grpc::ClientContext context;
  const grpc::Status status = stub->Create(&context, request, &response);
  engine.join();
  REQUIRE(status.ok());
  CHECK(response.id().rfind("chatcmpl-", 0) == 0);
  REQUIRE(response.choices_size() == 1);
  CHECK(response.choices(0).message().role() == "assistant");
  CHECK(response.choices(0).message().content() == "ok");
  CHECK(response.choices(0).finish_reason() == v1::FINISH_REASON_STOP);
  check_logprobs(response.choices(0).logprobs());

  grpc::ClientContext stream_context;
  auto reader = stub->CreateStream(&stream_context, request);
  answer();
  v1::ChatCompletionChunk chunk;
  v1::ChatLogprobs logprobs;
  std::string text;
  int num_roles = 0;
  bool is_first = true;
  while (reader->Read(&chunk)) {
    for (const auto& choice : chunk.choices()) {
      CHECK(choice.delta().has_role() == is_first);
      is_first = false;
      num_roles += choice.delta().has_role();
      text += choice.delta().content();
      logprobs.MergeFrom(choice.logprobs());
    }
  }
  REQUIRE(reader->Finish().ok());
  CHECK(num_roles == 1);
  CHECK(text == "ok");
  check_logprobs(logprobs);
}

TEST_CASE("Models, tokenizer and sparsity policies") {
  GrpcFixture fixture;
  auto models = v1::Models::NewStub(fixture.channel);
  {
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    REQUIRE(models->List(&context, {}, &response).ok());
    REQUIRE(response.models_size() == 2);
    CHECK(response.models(0).id() == "tiny");
    CHECK(response.models(0).max_model_len() == 1024);
  }
  {
    grpc::ClientContext context;
    v1::GetModelRequest request;
    request.set_model("alias");
    v1::Model response;
    REQUIRE(models->Get(&context, request, &response).ok());
    CHECK(response.id() == "alias");
  }
  auto tokenizer = v1::Tokenizer::NewStub(fixture.channel);
  v1::TokenizeResponse tokens;
  {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    request.set_prompt("h\xC3\xA9");
    REQUIRE(tokenizer->Tokenize(&context, request, &tokens).ok());
    CHECK(tokens.count() == 3);
    CHECK(tokens.max_model_len() == 1024);
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    *request.mutable_tokens() = tokens.tokens();
    v1::DetokenizeResponse response;
    REQUIRE(tokenizer->Detokenize(&context, request, &response).ok());
    CHECK(response.prompt() == "h\xC3\xA9");
  }
  {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    v1::ChatMessage* message = request.mutable_messages()->add_messages();
    message->set_role("user");
    message->set_content("x");
    REQUIRE(tokenizer->Tokenize(&context, request, &tokens).ok());
    CHECK(tokens.count() == 7);  // "user:x;"
  }
  {
    grpc::ClientContext context;
    v1::ListPoliciesResponse response;
    REQUIRE(v1::Sparsity::NewStub(fixture.channel)->ListPolicies(&context, {}, &response).ok());
    const auto& policies = fixture.service->policies().policies();
    REQUIRE(response.policies_size() == static_cast<int>(policies.size()));
    CHECK(response.policies(0).name() == "dense");
    CHECK(response.policies(0).is_default());
    for (size_t i = 0; i < policies.size(); ++i) {
      const v1::Policy& policy = response.policies(static_cast<int>(i));
      CHECK(policy.name() == policies[i].name);
      CHECK(policy.usable() == policies[i].usable());
      CHECK(policy.has_reason() != policy.usable());
      CHECK(nlohmann::json::parse(policy.policy_json()) == policies[i].body);
    }
  }
}

}  // namespace
}  // namespace gloam
