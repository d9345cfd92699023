#include "server/http/server.h"

#include <fcntl.h>
#include <unistd.h>

#include <thread>
#include <utility>
#include <vector>

#include "base/logging.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/asio/strand.hpp"
#include "boost/asio/write.hpp"
#include "server/api_error.h"
#include "server/openai/responses.h"

namespace gloam {

namespace asio = boost::asio;
using asio::ip::tcp;

namespace {

// Connections over the limit that may wait for their refusal to be sent; more are just closed.
constexpr int kMaxRefusals = 256;
constexpr std::chrono::milliseconds kAcceptPause{50};
constexpr std::chrono::milliseconds kCloseTime{1000};

HttpResponse OverloadedResponse() {
  HttpResponse response;
  response.status = 503;
  response.headers.emplace_back("Retry-After", "1");
  response.body = ErrorBody(WithErrorCode(
      Unavailable("The server has too many connections, please try again (--max-connections)"),
      kOverloadedCode));
  return response;
}

void WaitUntilZero(const std::atomic<int>& count, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (count.load() > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

}  // namespace

struct HttpServer::Impl {
  explicit Impl(const HttpServerOptions& o)
      : options(o), context(o.num_threads), acceptor(context), pause(context) {}

  ~Impl() {
    if (reserve_fd >= 0) ::close(reserve_fd);
  }

  Status Listen() {
    boost::system::error_code error;
    tcp::resolver resolver(context);
    const auto results =
        resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive, error);
    if (error || results.empty()) {
      return InvalidArgument("--host: cannot resolve '{}'", options.host);
    }
    const tcp::endpoint endpoint = results.begin()->endpoint();
    acceptor.open(endpoint.protocol(), error);
    if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor.bind(endpoint, error);
    if (!error) acceptor.listen(tcp::acceptor::max_listen_connections, error);
    if (!error) acceptor.non_blocking(true, error);
    if (error) {
      return Unavailable("cannot listen on {}:{} (--host, --port): {}", options.host, options.port,
                         error.message());
    }
    port = acceptor.local_endpoint().port();
    reserve_fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    return OkStatus();
  }

  void Accept() {
    acceptor.async_accept(asio::make_strand(context),
                          [this](boost::system::error_code error, tcp::socket socket) {
                            if (error == asio::error::operation_aborted) return;
                            if (error) return OnAcceptError(error);
                            Serve(std::move(socket));
                            Accept();
                          });
  }

  void Serve(tcp::socket socket) {
    const int connections = shared->connections.load();
    if (connections >= options.max_connections + kMaxRefusals) return;  // closes it
    auto executor = socket.get_executor();
    auto connection = std::make_shared<HttpConnection>(std::move(socket), shared);
    {
      std::lock_guard lock(shared->mutex);
      shared->open.emplace(connection.get(), connection);
    }
    const bool refuse = connections >= options.max_connections;
    asio::post(executor, [connection = std::move(connection), refuse] {
      refuse ? connection->Refuse(OverloadedResponse()) : connection->Start();
    });
  }

  // Out of descriptors: spend the one in reserve on telling the client so, then wait a little, as
  // accepting would only fail again at once.
  void OnAcceptError(boost::system::error_code error) {
    SPDLOG_WARN("accept: {}", error.message());
    if (reserve_fd >= 0 && (error == asio::error::no_descriptors ||
                            error == boost::system::errc::too_many_files_open_in_system)) {
      ::close(reserve_fd);
      tcp::socket socket(context);
      acceptor.accept(socket, error);
      if (!error) {
        static const std::string kRefusal =
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
            "Connection: close\r\n\r\n";
        socket.non_blocking(true, error);
        asio::write(socket, asio::buffer(kRefusal), error);
        socket.close(error);
      }
      reserve_fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    pause.expires_after(kAcceptPause);
    pause.async_wait([this](boost::system::error_code stopped) {
      if (!stopped) Accept();
    });
  }

  // Their last reference must not go away under the lock, which their destructor takes.
  std::vector<std::shared_ptr<HttpConnection>> OpenConnections() {
    std::vector<std::shared_ptr<HttpConnection>> connections;
    std::lock_guard lock(shared->mutex);
    for (const auto& [raw, weak] : shared->open) {
      if (auto connection = weak.lock()) connections.push_back(std::move(connection));
    }
    return connections;
  }

  void Stop(std::chrono::milliseconds grace) {
    if (threads.empty()) return;
    shared->closing = true;
    asio::post(context, [this] {
      boost::system::error_code ignored;
      acceptor.close(ignored);
      pause.cancel();
    });
    WaitUntilZero(shared->active_exchanges, grace);
    for (const auto& connection : OpenConnections()) connection->Close();
    WaitUntilZero(shared->connections, kCloseTime);
    shared->handler->Stop();
    context.stop();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }

  HttpServerOptions options;
  int port = 0;
  int reserve_fd = -1;
  std::shared_ptr<HttpShared> shared = std::make_shared<HttpShared>();
  asio::io_context context;  // its end destroys the connections, which cancels what they run
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  std::vector<std::thread> threads;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

HttpServer::~HttpServer() { Stop(std::chrono::milliseconds(0)); }

StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpServerOptions& options,
                                                        HttpHandler& handler) {
  auto impl = std::make_unique<Impl>(options);
  impl->shared->limits = options.limits;
  impl->shared->handler = &handler;
  impl->shared->allowed_origin = options.allowed_origin;
  GLOAM_RETURN_IF_ERROR(impl->Listen());
  impl->Accept();
  for (int i = 0; i < options.num_threads; ++i) {
    impl->threads.emplace_back([context = &impl->context] { context->run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const { return impl_->port; }

int HttpServer::num_connections() const { return impl_->shared->connections.load(); }

void HttpServer::Stop(std::chrono::milliseconds grace) { impl_->Stop(grace); }

}  // namespace gloam
