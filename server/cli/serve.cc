// `gloam serve`: start-up, signals and shutdown. The main thread loads, then waits; a signal thread
// turns SIGTERM and SIGINT into a drain, and a second one into an exit.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#include "base/logging.h"
#include "server/cli/cli.h"
#include "server/cli/local_model.h"
#include "server/cli/system_info.h"
#include "server/grpc/server.h"
#include "server/http/routes.h"
#include "server/http/server.h"
#include "server/version.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kSendGrace{5};             // for the last bytes of finished answers
constexpr std::chrono::milliseconds kWatchInterval{200};  // for a failed engine

std::chrono::milliseconds Milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

// Waits for SIGTERM and SIGINT. Must exist before any other thread, which then inherit the mask.
class SignalWaiter {
 public:
  SignalWaiter() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    ::signal(SIGPIPE, SIG_IGN);
    std::thread([this] { Run(); }).detach();  // it waits for as long as the process lives
  }

  // True when a signal came within `limit`.
  bool WaitFor(std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [this] { return stopping_; });
  }

  // From now on the first signal asks for a drain; before, it ends the process at once.
  void SetServing() {
    std::lock_guard lock(mutex_);
    serving_ = true;
  }

 private:
  void Run() {
    for (;;) {
      int signal = 0;
      if (sigwait(&set_, &signal) != 0) continue;
      std::lock_guard lock(mutex_);
      if (stopping_ || !serving_) _exit(128 + signal);
      stopping_ = true;
      changed_.notify_all();
    }
  }

  sigset_t set_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool serving_ = false;
  bool stopping_ = false;
};

HttpServerOptions MakeHttpOptions(const ServeOptions& options) {
  HttpServerOptions http;
  http.host = options.host;
  http.port = options.port;
  http.num_threads = options.http_threads;
  http.max_connections = options.max_connections;
  http.allowed_origin = options.allowed_origin;
  http.limits.max_body_bytes = static_cast<uint64_t>(options.max_body_bytes);
  http.limits.header_timeout = Milliseconds(options.header_timeout);
  http.limits.body_timeout = Milliseconds(options.body_timeout);
  http.limits.idle_timeout = Milliseconds(options.idle_timeout);
  http.limits.write_timeout = Milliseconds(options.write_timeout);
  return http;
}

ApiRoutesOptions MakeRoutesOptions(const ServeOptions& options) {
  ApiRoutesOptions routes;
  routes.api_keys = options.api_keys;
  routes.allowed_origin = options.allowed_origin;
  routes.request_timeout_ms = static_cast<int>(Milliseconds(options.request_timeout).count());
  return routes;
}

StatusOr<std::unique_ptr<GrpcServer>> StartGrpc(const ServeOptions& options,
                                                GenerationService& service) {
  GrpcServerOptions grpc;
  grpc.host = options.host;
  grpc.port = options.grpc_port;
  grpc.api_keys = options.api_keys;
  grpc.max_message_bytes = static_cast<int>(std::min<int64_t>(options.max_body_bytes, 1 << 30));
  grpc.request_timeout = Milliseconds(options.request_timeout);
  grpc.write_timeout = Milliseconds(options.write_timeout);
  return GrpcServer::Start(grpc, service);
}

void PrintBanner(const ServeOptions& options, const LocalModel& model, const HttpServer& http,
                 const GrpcServer* grpc) {
  fmt::print(
      "\nGloam {} is ready\n{}  HTTP      http://{}:{}/v1 (page at /, metrics at /metrics)\n",
      kVersion, model.Describe(), options.host, http.port());
  if (grpc != nullptr) fmt::print("  gRPC      {}:{}\n", options.host, grpc->port());
  fmt::print("\n");
  std::fflush(stdout);
}

}  // namespace

int Fail(const Status& status) {
  fmt::print(stderr, "gloam: {}\n", MessageOf(status));
  return kExitFailure;
}

int RunServe(const ServeOptions& options) {
  SignalWaiter& signals = *new SignalWaiter();  // never destroyed: its thread never ends
  const auto log_format = options.log_format == "json" ? LogFormat::kJson : LogFormat::kText;
  if (const Status status = InitLogging(options.log_level, log_format); !status.ok()) {
    return Fail(status);
  }
  RaiseFileDescriptorLimit();

  ApiRoutes routes(MakeRoutesOptions(options));
  auto http = HttpServer::Start(MakeHttpOptions(options), routes);
  if (!http.ok()) return Fail(http.status());
  auto model = LocalModel::Load(options);
  if (!model.ok()) return Fail(model.status());
  std::unique_ptr<GrpcServer> grpc;
  if (options.enable_grpc) {
    auto started = StartGrpc(options, (*model)->service());
    if (!started.ok()) return Fail(started.status());
    grpc = *std::move(started);
  }
  signals.SetServing();
  routes.SetService(&(*model)->service(), &(*model)->metrics());
  if (grpc) grpc->SetServing(true);
  PrintBanner(options, **model, **http, grpc.get());

  Engine& engine = (*model)->engine();
  while (!signals.WaitFor(kWatchInterval) && !engine.failed()) {
  }
  const bool failed = engine.failed();
  if (failed) SPDLOG_ERROR("the engine has failed, stopping");
  SPDLOG_INFO("draining: running requests have {} s to finish", options.shutdown_timeout);
  routes.SetDraining();
  if (grpc) grpc->SetServing(false);
  engine.Drain(Clock::now() + Milliseconds(failed ? 0 : options.shutdown_timeout));
  if (grpc) grpc->Shutdown(std::chrono::system_clock::now() + kSendGrace);
  (*http)->Stop(kSendGrace);
  SPDLOG_INFO("stopped");
  // What failed or hangs is not touched again, not even to free its memory.
  if (failed) {
    spdlog::shutdown();
    std::_Exit(kExitFailure);
  }
  http->reset();
  grpc.reset();
  model->reset();
  spdlog::shutdown();
  return 0;
}

}  // namespace gloam
