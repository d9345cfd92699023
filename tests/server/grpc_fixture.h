// A gRPC server over a FakeEngine, and a client's channel to it.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "catch2/catch.hpp"
#include "fake_engine.h"
#include "gloam/v1/chat_completions.grpc.pb.h"
#include "gloam/v1/completions.grpc.pb.h"
#include "gloam/v1/models.grpc.pb.h"
#include "gloam/v1/sparsity.grpc.pb.h"
#include "gloam/v1/tokenizer.grpc.pb.h"
#include "grpcpp/grpcpp.h"
#include "server/grpc/server.h"

namespace gloam {

struct GrpcFixture {
  // `channel` is made with small HTTP/2 windows where a test needs a reader that is easily slow.
  explicit GrpcFixture(GrpcServerOptions options = {}, bool small_windows = false);

  std::unique_ptr<v1::Completions::Stub> Completions() { return v1::Completions::NewStub(channel); }

  FakeEngine engine;
  ByteTokenizer tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<GenerationService> service;
  std::unique_ptr<GrpcServer> server;
  std::shared_ptr<grpc::Channel> channel;
};

// {prompt: "hi"}, valid as it is.
v1::CreateCompletionRequest HiRequest();

// The trailing metadata's value, or "".
std::string Trailer(const grpc::ClientContext& context, const std::string& key);

// Runs `Completions.Create` on a thread of its own; Join() gives the outcome.
class CreateCall {
 public:
  CreateCall(GrpcFixture& fixture, v1::CreateCompletionRequest request);
  ~CreateCall();

  grpc::Status Join();

  grpc::ClientContext context;
  v1::Completion response;

 private:
  grpc::Status status_;
  std::thread thread_;
};

}  // namespace gloam
