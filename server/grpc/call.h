// The life of one generation RPC: gRPC's reactors over RunningGeneration. A call owns itself until
// gRPC reports OnDone. Its state is under one mutex; gRPC's threads and the call loop's thread
// advance it, the engine thread only wakes it through the loop.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "server/generation_service.h"
#include "server/grpc/codec.h"
#include "server/running_generation.h"

namespace gloam {

class GrpcCall;

// One thread that advances the calls which the engine woke, so that encoding and socket writes
// never happen on the engine thread; and that cancels streams whose reader has stopped reading.
// Must outlive its calls.
class GrpcCallLoop {
 public:
  explicit GrpcCallLoop(std::chrono::milliseconds write_timeout);
  ~GrpcCallLoop();

  // Has the thread advance the call, if it still lives. Any thread, never waits.
  void Wake(std::weak_ptr<GrpcCall> call);

  // A call is registered while gRPC knows it.
  void Register(const std::shared_ptr<GrpcCall>& call);
  void Unregister(GrpcCall* call);

  // Waits until no call is registered; false when the deadline came first.
  bool WaitUntilIdle(std::chrono::system_clock::time_point deadline);

 private:
  void Run();

  const std::chrono::milliseconds write_timeout_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::vector<std::weak_ptr<GrpcCall>> woken_;
  std::unordered_map<GrpcCall*, std::weak_ptr<GrpcCall>> calls_;
  bool stopping_ = false;
  std::thread thread_;
};

// What a call needs to begin.
struct GrpcCallStart {
  using MakeEncoder = std::unique_ptr<AnswerEncoder> (*)(const RunningGeneration&, const Tokenizer&,
                                                         const std::string&);

  GrpcCallLoop& loop;
  grpc::CallbackServerContext& context;
  GenerationService& service;
  StatusOr<PreparedGeneration> prepared;  // an error ends the call at once
  MakeEncoder make_encoder;
  size_t max_queued_bytes;
  std::chrono::milliseconds request_timeout;  // 0: none
};

class GrpcCall : public std::enable_shared_from_this<GrpcCall> {
 public:
  virtual ~GrpcCall() = default;

  // Does what can be done now: takes the engine's output, writes, finishes. Any thread.
  virtual void Advance() = 0;

  // Cancels the RPC when its pending write began before `limit`.
  void CancelIfStalled(std::chrono::steady_clock::time_point limit);

 protected:
  GrpcCall(GrpcCallLoop& loop, grpc::CallbackServerContext& context)
      : loop_(loop), context_(context) {}

  // Registers the call, starts the generation, and advances it. `this` must be in a shared_ptr.
  void Begin(GrpcCallStart start);

  // The client is gone, or its deadline has come: stops the engine's work and ends the call.
  void HandleCancel();
  // gRPC's last word: lets go of the call.
  void HandleDone();

  // The status for gRPC; the trailing metadata gets the error's param and code. Under mutex_.
  grpc::Status EndLocked(const Status& status);

  GrpcCallLoop& loop_;
  grpc::CallbackServerContext& context_;  // until done_

  std::mutex mutex_;
  std::unique_ptr<RunningGeneration> running_;  // null when it could not start
  std::unique_ptr<AnswerEncoder> encoder_;      // null with running_
  Status failure_;                              // ends the call instead of an answer
  bool started_ = false;                        // running_ or failure_ is set
  bool ended_ = false;                          // Finish was called, or is about to be
  bool done_ = false;                           // OnDone came
  std::chrono::steady_clock::time_point write_began_ = std::chrono::steady_clock::time_point::max();

 private:
  std::shared_ptr<GrpcCall> self_;
};

// The whole answer in `response`. The returned reactor is gRPC's.
grpc::ServerUnaryReactor* StartUnaryCall(GrpcCallStart start, grpc::ByteBuffer* response);

// The answer as a stream of chunks, one write at a time: a slow reader gets fewer, longer ones.
grpc::ServerWriteReactor<grpc::ByteBuffer>* StartStreamCall(GrpcCallStart start);

// Codes are the same in both; `param` and `code` become trailing metadata, and a full queue
// becomes UNAVAILABLE, which clients retry.
grpc::Status ToGrpcStatus(const Status& status, grpc::CallbackServerContext* context);

}  // namespace gloam
