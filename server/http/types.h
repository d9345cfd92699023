// The nouns between the HTTP transport (connection.h) and what it serves (routes.h): a request, a
// whole response, and the exchange through which a handler answers, at once or as a stream of
// events.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "boost/asio/any_io_executor.hpp"

namespace gloam {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string authorization;
  std::string content_type;
  std::string id;  // x-request-id: the client's when sane, else made here
  std::string body;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  HttpHeaders headers;  // beyond those that the transport adds
  bool close = false;   // ends the connection
};

// One request's way back to its client. Every method must be called on executor(); exactly one
// Respond, or one BeginStream and a last WriteStream, ends the exchange. After a disconnect the
// calls do nothing.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;

  virtual boost::asio::any_io_executor executor() = 0;
  virtual void Respond(HttpResponse response) = 0;

  // Sends the head of a text/event-stream. `on_written` runs after every WriteStream that reached
  // the socket; only then may the next one follow.
  virtual void BeginStream(std::function<void()> on_written) = 0;
  virtual void WriteStream(std::string bytes, bool last) = 0;

  // `on_disconnect` runs once, when the client goes away (or stops reading) before the end.
  virtual void SetOnDisconnect(std::function<void()> on_disconnect) = 0;
};

class HttpHandler {
 public:
  virtual ~HttpHandler() = default;

  // Runs on the exchange's executor and must not wait; may keep `exchange` and answer later.
  virtual void Handle(HttpRequest request, std::shared_ptr<HttpExchange> exchange) = 0;

  // Returns when no thread of the handler's uses an exchange any more. The server calls it before
  // the exchanges' executor ends.
  virtual void Stop() = 0;
};

// "Not Found" for 404 and so on.
const char* HttpReason(int status);

// `text` when it can be echoed as an x-request-id (1-128 printable ASCII characters), else a new
// unique id.
std::string SaneRequestId(std::string_view text);

}  // namespace gloam
