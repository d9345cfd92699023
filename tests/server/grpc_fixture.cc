#include "grpc_fixture.h"

#include <utility>

namespace gloam {

GrpcFixture::GrpcFixture(GrpcServerOptions options, bool small_windows) {
  auto parsed = ChatTemplate::Parse(
      "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}", "", "");
  REQUIRE(parsed.ok());
  chat_template = *std::move(parsed);
  service = std::make_unique<GenerationService>(
      GenerationServiceOptions{{"tiny", "alias"}, BuiltinPolicyRegistry()}, engine, tokenizer,
      chat_template.get(), GenerationDefaults{});
  options.port = 0;
  auto started = GrpcServer::Start(options, *service);
  REQUIRE(started.ok());
  server = *std::move(started);
  server->SetServing(true);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  if (small_windows) {
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  }
  channel = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server->port()),
                                      grpc::InsecureChannelCredentials(), arguments);
}

v1::CreateCompletionRequest HiRequest() {
  v1::CreateCompletionRequest request;
  request.set_model("tiny");
  request.add_prompt()->set_text("hi");
  return request;
}

std::string Trailer(const grpc::ClientContext& context, const std::string& key) {
  const auto& trailers = context.GetServerTrailingMetadata();
  const auto found = trailers.find(key);
  return found == trailers.end() ? "" : std::string(found->second.data(), found->second.size());
}

CreateCall::CreateCall(GrpcFixture& fixture, v1::CreateCompletionRequest request)
    : thread_([this, stub = std::shared_ptr(fixture.Completions()), request = std::move(request)] {
        status_ = stub->Create(&context, request, &response);
      }) {}

CreateCall::~CreateCall() {
  if (thread_.joinable()) thread_.join();
}

grpc::Status CreateCall::Join() {
  thread_.join();
  return status_;
}

}  // namespace gloam
