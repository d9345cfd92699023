// Bad requests, refusals, and clients that go away or do not read.

#include <cmath>
#include <functional>

#include "grpc_fixture.h"
#include "grpcpp/impl/codegen/client_unary_call.h"
#include "server/api_error.h"

namespace gloam {
namespace {

grpc::ByteBuffer Bytes(const std::string& text) {
  const grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

TEST_CASE("Bad fields: INVALID_ARGUMENT, with the field in gloam-error-param") {
  GrpcFixture fixture;
  using Change = std::function<void(v1::CreateCompletionRequest&)>;
  const std::vector<std::pair<std::string, Change>> cases = {
      {"temperature", [](auto& request) { request.set_temperature(3); }},
      {"temperature", [](auto& request) { request.set_temperature(std::nan("")); }},
      {"top_p", [](auto& request) { request.set_top_p(0); }},
      {"n", [](auto& request) { request.set_n(0); }},
      {"max_tokens", [](auto& request) { request.set_max_tokens(-1); }},
      {"logprobs", [](auto& request) { request.set_logprobs(1000); }},
      {"stop",
       [](auto& request) {
         for (int i = 0; i < 5; ++i) request.add_stop("x");
       }},
      {"stop", [](auto& request) { request.add_stop(""); }},
      {"logit_bias", [](auto& request) { (*request.mutable_logit_bias())[-1] = 1; }},
      {"logit_bias", [](auto& request) { (*request.mutable_logit_bias())[1] = 101; }},
      {"sparsity.policy", [](auto& request) { request.mutable_sparsity()->set_policy("quest"); }},
      {"sparsity.p", [](auto& request) { request.mutable_sparsity()->set_p(0.5); }},
      {"sparsity.token_budget",
       [](auto& request) { request.mutable_sparsity()->set_token_budget(1); }},
      {"sparsity.selector.config_path",
       [](auto& request) { request.mutable_sparsity()->set_policy("ds_twi"); }},
      {"sparsity.policy_json",
       [](auto& request) { request.mutable_sparsity()->set_policy_json("{"); }},
      {"sparsity.policy_json",
       [](auto& request) { request.mutable_sparsity()->set_policy_json("5"); }},
      {"sparsity.policy_json",
       [](auto& request) {
         request.mutable_sparsity()->set_policy_json("{}");
         request.mutable_sparsity()->set_policy("dense");
       }},
      {"sparsity.selector.token_budget",
       [](auto& request) {
         request.mutable_sparsity()->set_policy_json(
             R"({"selector": {"type": "quest", "token_budget": 0}})");
       }},
      {"sparsity_decode_prompt_tokens",
       [](auto& request) { request.set_sparsity_decode_prompt_tokens(2); }},
      {"prompt", [](auto& request) { request.clear_prompt(); }},
      {"prompt[1]", [](auto& request) { request.add_prompt(); }},
      {"best_of", [](auto& request) { request.set_n(3), request.set_best_of(2); }},
      {"stream_options", [](auto& request) { request.mutable_stream_options(); }},
  };
  for (const auto& [param, change] : cases) {
    INFO(param);
    v1::CreateCompletionRequest request = HiRequest();
    change(request);
    CreateCall call(fixture, request);
    const grpc::Status status = call.Join();
    CHECK(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT);
    CHECK(Trailer(call.context, "gloam-error-param") == param);
    CHECK_FALSE(status.error_message().empty());
  }
}

TEST_CASE("Bad chat fields, over the stream too") {
  GrpcFixture fixture;
  auto stub = v1::ChatCompletions::NewStub(fixture.channel);
  v1::CreateChatCompletionRequest no_messages;
  v1::CreateChatCompletionRequest lone_top_logprobs;
  lone_top_logprobs.add_messages()->set_role("user");
  lone_top_logprobs.set_top_logprobs(2);
  v1::CreateChatCompletionRequest no_room = lone_top_logprobs;
  no_room.clear_top_logprobs();
  no_room.set_max_completion_tokens(100'000);
  for (const auto& [param, request] :
       std::vector<std::pair<std::string, v1::CreateChatCompletionRequest>>{
           {"messages", no_messages},
           {"top_logprobs", lone_top_logprobs},
           {"max_completion_tokens", no_room}}) {
    INFO(param);
    grpc::ClientContext context;
    auto reader = stub->CreateStream(&context, request);
    v1::ChatCompletionChunk chunk;
    CHECK_FALSE(reader->Read(&chunk));
    CHECK(reader->Finish().error_code() == grpc::StatusCode::INVALID_ARGUMENT);
    CHECK(Trailer(context, "gloam-error-param") == param);
  }
}

TEST_CASE("An unknown model is NOT_FOUND") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.set_model("huge");
  CreateCall call(fixture, request);
  CHECK(call.Join().error_code() == grpc::StatusCode::NOT_FOUND);
  CHECK(Trailer(call.context, "gloam-error-param") == "model");
  CHECK(Trailer(call.context, "gloam-error-code") == "model_not_found");
}

TEST_CASE("Bytes that are no request: INVALID_ARGUMENT; unknown methods: UNIMPLEMENTED") {
  GrpcFixture fixture;
  const auto status_of = [&](const char* path, const std::string& bytes) {
    const grpc::internal::RpcMethod method(path, grpc::internal::RpcMethod::NORMAL_RPC);
    grpc::ClientContext context;
    grpc::ByteBuffer response;
    return grpc::internal::BlockingUnaryCall(fixture.channel.get(), method, &context, Bytes(bytes),
                                             &response)
        .error_code();
  };
  const std::string garbage = "\xff\xff\xff\xff";
  const std::string bad_utf8 = "\x0a\x02\xc3\x28";  // field 1, a string of two bytes
  for (const char* path : {"/gloam.v1.Completions/Create", "/gloam.v1.ChatCompletions/Create",
                           "/gloam.v1.Models/Get", "/gloam.v1.Tokenizer/Tokenize"}) {
    INFO(path);
    CHECK(status_of(path, garbage) == grpc::StatusCode::INVALID_ARGUMENT);
    CHECK(status_of(path, bad_utf8) == grpc::StatusCode::INVALID_ARGUMENT);
  }
  CHECK(status_of("/gloam.v1.Completions/Nothing", "") == grpc::StatusCode::UNIMPLEMENTED);
}

TEST_CASE("A request over the size limit is RESOURCE_EXHAUSTED") {
  GrpcServerOptions options;
  options.max_message_bytes = 1000;
  GrpcFixture fixture(options);
  v1::CreateCompletionRequest request;
  request.add_prompt()->set_text(std::string(2000, 'x'));
  CreateCall call(fixture, request);
  CHECK(call.Join().error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST_CASE("API keys: every method of gloam.v1 asks for one") {
  GrpcServerOptions options;
  options.api_keys = {"first", "second"};
  GrpcFixture fixture(options);
  auto models = v1::Models::NewStub(fixture.channel);
  const auto list = [&](const std::string& authorization) {
    grpc::ClientContext context;
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    v1::ListModelsResponse response;
    return models->List(&context, {}, &response).error_code();
  };
  for (const char* wrong : {"", "Bearer ", "Bearer firs", "Bearer firstt", "first", "bearer"}) {
    INFO(wrong);
    CHECK(list(wrong) == grpc::StatusCode::UNAUTHENTICATED);
  }
  CHECK(list("Bearer first") == grpc::StatusCode::OK);
  CHECK(list("Bearer second") == grpc::StatusCode::OK);

  CreateCall call(fixture, HiRequest());
  CHECK(call.Join().error_code() == grpc::StatusCode::UNAUTHENTICATED);
  CHECK(Trailer(call.context, "gloam-error-code") == "invalid_api_key");
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  v1::CompletionChunk chunk;
  CHECK_FALSE(reader->Read(&chunk));
  CHECK(reader->Finish().error_code() == grpc::StatusCode::UNAUTHENTICATED);
}

TEST_CASE("What the engine refuses") {
  GrpcFixture fixture;
  fixture.engine.Refuse(ResourceExhausted("the queue is full"));
  CreateCall full(fixture, HiRequest());
  CHECK(full.Join().error_code() == grpc::StatusCode::UNAVAILABLE);
  CHECK(Trailer(full.context, "gloam-error-code") == "server_is_overloaded");
  fixture.engine.Refuse(Unavailable("draining"));
  CreateCall draining(fixture, HiRequest());
  CHECK(draining.Join().error_code() == grpc::StatusCode::UNAVAILABLE);
}

TEST_CASE("An answer that fails ends its call with the engine's error") {
  GrpcFixture fixture;
  CreateCall call(fixture, HiRequest());
  RequestHandle handle = fixture.engine.WaitForRequest();
  fixture.engine.Finish(handle, FinishReason::kError, 0,
                        MakeStatus(StatusCode::kDeadlineExceeded, "too late"));
  fixture.engine.End(handle);
  const grpc::Status status = call.Join();
  CHECK(status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  CHECK(status.error_message() == "too late");

  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  handle = fixture.engine.WaitForRequest();
  REQUIRE(fixture.engine.Push(handle, "a"));
  v1::CompletionChunk chunk;
  REQUIRE(reader->Read(&chunk));
  fixture.engine.Finish(handle, FinishReason::kError, 0, Internal("a fault"));
  fixture.engine.End(handle);
  CHECK_FALSE(reader->Read(&chunk));
  CHECK(reader->Finish().error_code() == grpc::StatusCode::INTERNAL);
}

TEST_CASE("A client's cancel reaches the engine, in every state, once") {
  GrpcFixture fixture;
  auto stub = fixture.Completions();
  // How far the request gets before the client cancels.
  const std::vector<std::function<void(RequestHandle)>> states = {
      [](RequestHandle) {},
      [&](RequestHandle handle) { REQUIRE(fixture.engine.Push(handle, "a")); },
      [&](RequestHandle handle) {
        for (int i = 0; i < 100; ++i) REQUIRE(fixture.engine.Push(handle, "a"));
      },
      [&](RequestHandle handle) { fixture.engine.Finish(handle); }};
  for (size_t state = 0; state < states.size(); ++state) {
    INFO(state);
    grpc::ClientContext stream_context;
    auto reader = stub->CreateStream(&stream_context, HiRequest());
    RequestHandle handle = fixture.engine.WaitForRequest();
    states[state](handle);
    stream_context.TryCancel();
    CHECK(reader->Finish().error_code() == grpc::StatusCode::CANCELLED);
    fixture.engine.WaitForCancel(handle);
    fixture.engine.End(handle);
    const RequestHandle stream_handle = handle;

    CreateCall call(fixture, HiRequest());
    handle = fixture.engine.WaitForRequest();
    states[state](handle);
    call.context.TryCancel();
    CHECK(call.Join().error_code() == grpc::StatusCode::CANCELLED);
    fixture.engine.WaitForCancel(handle);
    fixture.engine.End(handle);

    CHECK(fixture.engine.num_cancels(stream_handle) == 1);
    CHECK(fixture.engine.num_cancels(handle) == 1);
  }
}

TEST_CASE("With several prompts a cancel reaches each of their requests") {
  GrpcFixture fixture;
  v1::CreateCompletionRequest request = HiRequest();
  request.add_prompt()->set_text("second");
  request.set_n(3);
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, request);
  const RequestHandle first = fixture.engine.WaitForRequest();
  const RequestHandle second = fixture.engine.WaitForRequest();
  context.TryCancel();
  CHECK(reader->Finish().error_code() == grpc::StatusCode::CANCELLED);
  fixture.engine.WaitForCancel(first);
  fixture.engine.WaitForCancel(second);
}

TEST_CASE("The call's deadline is the request's, and cancels it") {
  GrpcFixture fixture;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  const RequestHandle handle = fixture.engine.WaitForRequest();
  const auto deadline = fixture.engine.request(handle).deadline;
  REQUIRE(deadline);
  CHECK(*deadline <= std::chrono::steady_clock::now() + std::chrono::seconds(60));
  CHECK(reader->Finish().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  fixture.engine.WaitForCancel(handle);
}

TEST_CASE("A slow reader gets the same text in fewer chunks") {
  GrpcFixture fixture({}, /*small_windows=*/true);
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  const RequestHandle handle = fixture.engine.WaitForRequest();
  constexpr int kNumDeltas = 500;
  std::string expected;
  for (int i = 0; i < kNumDeltas; ++i) {
    const std::string text = std::string(1000, static_cast<char>('a' + i % 26));
    expected += text;
    REQUIRE(fixture.engine.Push(handle, text));
  }
  fixture.engine.Finish(handle);
  fixture.engine.End(handle);
  int num_chunks = 0;
  std::string text;
  v1::CompletionChunk chunk;
  while (reader->Read(&chunk)) {
    ++num_chunks;
    for (const auto& choice : chunk.choices()) text += choice.text();
  }
  REQUIRE(reader->Finish().ok());
  CHECK(text == expected);
  CHECK(num_chunks < kNumDeltas);
}

TEST_CASE("A reader that never reads is cancelled: bounded memory, then the write's timeout") {
  GrpcServerOptions options;
  options.max_queued_bytes = 100'000;
  options.write_timeout = std::chrono::milliseconds(200);
  GrpcFixture fixture(options, /*small_windows=*/true);
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  const RequestHandle handle = fixture.engine.WaitForRequest();
  // The engine is told to stop after the queue's bound and what the windows and buffers take.
  bool was_refused = false;
  for (int i = 0; i < 10'000 && !was_refused; ++i) {
    was_refused = !fixture.engine.Push(handle, std::string(1000, 'a'));
  }
  CHECK(was_refused);
  fixture.engine.WaitForCancel(handle);  // the timeout came: overflow alone calls no Cancel
  v1::CompletionChunk chunk;
  while (reader->Read(&chunk)) {
  }
  CHECK(reader->Finish().error_code() == grpc::StatusCode::CANCELLED);
}

}  // namespace
}  // namespace gloam
