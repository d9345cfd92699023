// HttpServer: the listener, its I/O threads and all connections. Sheds what is over its limits and
// survives running out of file descriptors. Methods: one thread at a time.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "base/status.h"
#include "server/http/connection.h"

namespace gloam {

struct HttpServerOptions {
  std::string host = "127.0.0.1";
  int port = 8000;  // 0: a free one, see HttpServer::port()
  int num_threads = 2;
  int max_connections = 4096;  // more are answered 503 and closed
  std::string allowed_origin;  // for pages of other sites: their origin, or "*"; empty: none
  HttpLimits limits;
};

class HttpServer {
 public:
  // Listens and answers through `handler`, which must outlive the server.
  // Errors: kInvalidArgument (host), kUnavailable when the address is taken.
  [[nodiscard]] static StatusOr<std::unique_ptr<HttpServer>> Start(const HttpServerOptions& options,
                                                                   HttpHandler& handler);
  ~HttpServer();  // Stop(0 s), unless that was done

  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;
  int num_connections() const;

  // Stops listening, gives answers under way up to `grace` to be sent, closes everything and ends
  // the threads.
  void Stop(std::chrono::milliseconds grace);

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gloam
