// Start, health, reflection and shutdown of the gRPC server.

#include <atomic>

#include "grpc_fixture.h"
#include "grpcpp/impl/codegen/client_unary_call.h"

namespace gloam {
namespace {

using std::chrono::system_clock;

grpc::ByteBuffer Bytes(const std::string& text) {
  const grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

std::string Text(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  REQUIRE(buffer.Dump(&slices).ok());
  std::string text;
  for (const grpc::Slice& slice : slices) text.append(slice.begin(), slice.end());
  return text;
}

// grpc.health.v1 by its wire format, as no generated code for it is installed: the request's
// field 1 is the service's name, the response's field 1 the status.
std::string HealthRequest(const std::string& service) {
  return service.empty() ? ""
                         : "\x0a" + std::string(1, static_cast<char>(service.size())) + service;
}
const std::string kServing = "\x08\x01";
const std::string kNotServing = "\x08\x02";

std::string CheckHealth(GrpcFixture& fixture, const std::string& service) {
  const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Check",
                                         grpc::internal::RpcMethod::NORMAL_RPC);
  grpc::ClientContext context;
  grpc::ByteBuffer response;
  const grpc::Status status = grpc::internal::BlockingUnaryCall(
      fixture.channel.get(), method, &context, Bytes(HealthRequest(service)), &response);
  return status.ok() ? Text(response) : "error " + std::to_string(status.error_code());
}

TEST_CASE("Health: NOT_SERVING until told otherwise, without a key, by service and overall") {
  GrpcServerOptions options;
  options.api_keys = {"key"};
  GrpcFixture fixture(options);
  fixture.server->SetServing(false);
  for (const char* service : {"", "gloam.v1.Completions", "gloam.v1.Models"}) {
    INFO(service);
    CHECK(CheckHealth(fixture, service) == kNotServing);
    fixture.server->SetServing(true);
    CHECK(CheckHealth(fixture, service) == kServing);
    fixture.server->SetServing(false);
  }
  CHECK(CheckHealth(fixture, "nothing") == "error " + std::to_string(grpc::StatusCode::NOT_FOUND));
}

TEST_CASE("Health.Watch reports every change") {
  GrpcFixture fixture;
  const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Watch",
                                         grpc::internal::RpcMethod::SERVER_STREAMING);
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> reader(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(
          fixture.channel.get(), method, &context, Bytes(HealthRequest("gloam.v1.Completions"))));
  grpc::ByteBuffer status;
  REQUIRE(reader->Read(&status));
  CHECK(Text(status) == kServing);
  for (const bool serving : {false, true}) {
    fixture.server->SetServing(serving);
    REQUIRE(reader->Read(&status));
    CHECK(Text(status) == (serving ? kServing : kNotServing));
  }
  context.TryCancel();
  CHECK(reader->Finish().error_code() == grpc::StatusCode::CANCELLED);
}

TEST_CASE("Generation is refused while not serving, the rest is not") {
  GrpcFixture fixture;
  fixture.server->SetServing(false);
  CreateCall call(fixture, HiRequest());
  CHECK(call.Join().error_code() == grpc::StatusCode::UNAVAILABLE);
  grpc::ClientContext context;
  v1::ListModelsResponse response;
  CHECK(v1::Models::NewStub(fixture.channel)->List(&context, {}, &response).ok());
}

TEST_CASE("Reflection lists every service") {
  GrpcFixture fixture;
  const grpc::internal::RpcMethod method(
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
      grpc::internal::RpcMethod::BIDI_STREAMING);
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>> stream(
      grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
          fixture.channel.get(), method, &context));
  REQUIRE(stream->Write(Bytes("\x3a\x01*")));  // list_services: "*"
  grpc::ByteBuffer response;
  REQUIRE(stream->Read(&response));
  const std::string services = Text(response);
  for (const char* service : {"gloam.v1.Completions", "gloam.v1.ChatCompletions", "gloam.v1.Models",
                              "gloam.v1.Tokenizer", "gloam.v1.Sparsity", "grpc.health.v1.Health"}) {
    INFO(service);
    CHECK(services.find(service) != std::string::npos);
  }
  stream->WritesDone();
  CHECK(stream->Finish().ok());
}

TEST_CASE("A port in use and bad options are errors") {
  GrpcFixture fixture;
  GrpcServerOptions options;
  options.port = fixture.server->port();
  CHECK(GrpcServer::Start(options, *fixture.service).status().code() == StatusCode::kUnavailable);
  options.port = 70000;
  CHECK(GrpcServer::Start(options, *fixture.service).status().code() ==
        StatusCode::kInvalidArgument);
}

TEST_CASE("Shutdown lets a running stream finish and ends health watches") {
  GrpcFixture fixture;
  const grpc::internal::RpcMethod watch("/grpc.health.v1.Health/Watch",
                                        grpc::internal::RpcMethod::SERVER_STREAMING);
  grpc::ClientContext watch_context;
  std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> watcher(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(fixture.channel.get(), watch,
                                                                    &watch_context, Bytes("")));
  grpc::ByteBuffer health;
  REQUIRE(watcher->Read(&health));

  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  const RequestHandle handle = fixture.engine.WaitForRequest();
  REQUIRE(fixture.engine.Push(handle, "one "));
  std::atomic<bool> is_down = false;
  std::thread shutdown([&] {
    fixture.server->Shutdown(system_clock::now() + std::chrono::minutes(1));
    is_down = true;
  });
  REQUIRE(watcher->Read(&health));
  CHECK(Text(health) == kNotServing);
  CreateCall refused(fixture, HiRequest());
  CHECK(refused.Join().error_code() == grpc::StatusCode::UNAVAILABLE);
  CHECK_FALSE(is_down);
  REQUIRE(fixture.engine.Push(handle, "two"));
  fixture.engine.Finish(handle);
  fixture.engine.End(handle);
  std::string text;
  v1::CompletionChunk chunk;
  while (reader->Read(&chunk)) {
    for (const auto& choice : chunk.choices()) text += choice.text();
  }
  CHECK(reader->Finish().ok());
  CHECK(text == "one two");
  shutdown.join();
  CHECK_FALSE(watcher->Read(&health));
  CHECK_FALSE(watcher->Finish().ok());
  CHECK(fixture.engine.num_cancels(handle) == 0);
}

TEST_CASE("Shutdown at its deadline cancels what still runs") {
  GrpcFixture fixture;
  grpc::ClientContext context;
  auto stub = fixture.Completions();
  auto reader = stub->CreateStream(&context, HiRequest());
  const RequestHandle stream = fixture.engine.WaitForRequest();
  CreateCall call(fixture, HiRequest());
  const RequestHandle unary = fixture.engine.WaitForRequest();
  fixture.server->Shutdown(system_clock::now());
  fixture.engine.WaitForCancel(stream);
  fixture.engine.WaitForCancel(unary);
  CHECK_FALSE(reader->Finish().ok());
  CHECK_FALSE(call.Join().ok());
  // The engine may still talk to a call that is gone.
  CHECK_FALSE(fixture.engine.Push(stream, "late"));
  fixture.engine.End(stream);
  fixture.engine.End(unary);
}

}  // namespace
}  // namespace gloam
