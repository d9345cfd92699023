// GrpcServer: the gRPC front end (proto/gloam/v1) with grpc.health.v1.Health and server reflection.
// Built on gRPC's callback API: gRPC's threads run the handlers, one writer thread of ours sends
// what the engine made, and the engine thread only posts. Methods: one thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "server/generation_service.h"

namespace gloam {

struct GrpcServerOptions {
  std::string host = "127.0.0.1";
  int port = 50051;                              // 0: a free one, see GrpcServer::port()
  std::vector<std::string> api_keys;             // empty: every call is let in
  int max_message_bytes = 16 << 20;              // of one request
  std::chrono::milliseconds request_timeout{0};  // bounds every call's deadline; 0: the client's
  size_t max_queued_bytes = 4 << 20;  // output that waits for one slow reader, then CANCELLED
  std::chrono::milliseconds write_timeout{60'000};  // a stream not read for so long is CANCELLED
};

class GrpcServer {
 public:
  // Listens at once; health answers NOT_SERVING and generation is refused with UNAVAILABLE until
  // SetServing(true). `service` must outlive the server. Errors: kInvalidArgument naming the
  // option; kUnavailable when the address is taken.
  [[nodiscard]] static StatusOr<std::unique_ptr<GrpcServer>> Start(const GrpcServerOptions& options,
                                                                   GenerationService& service);
  ~GrpcServer();  // Shutdown(now), unless that was done

  GrpcServer(const GrpcServer&) = delete;
  GrpcServer& operator=(const GrpcServer&) = delete;

  // What health reports, to Check and to every Watch; false also refuses new generation.
  void SetServing(bool serving);

  // SetServing(false), waits for running calls until `deadline`, cancels the rest, and returns when
  // no call is left.
  void Shutdown(std::chrono::system_clock::time_point deadline);

  int port() const;

 private:
  struct Impl;
  explicit GrpcServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gloam
