// An HTTP server over a FakeEngine, and raw sockets to it, on which anything can be sent.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "catch2/catch.hpp"
#include "fake_engine.h"
#include "nlohmann/json.hpp"
#include "server/http/routes.h"
#include "server/http/server.h"

namespace gloam {

struct HttpFixture {
  explicit HttpFixture(HttpServerOptions http = {}, ApiRoutesOptions api = {});
  ~HttpFixture();

  FakeEngine engine;
  ByteTokenizer tokenizer;
  MetricsRegistry metrics{"m"};
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<GenerationService> service;
  std::unique_ptr<ApiRoutes> routes;
  std::unique_ptr<HttpServer> server;
};

struct RawResponse {
  int status = 0;                              // 0: the server closed without an answer
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined

  nlohmann::json Json() const { return nlohmann::json::parse(body); }
};

// A client's socket. Every wait ends after a minute with a failed test.
class RawClient {
 public:
  explicit RawClient(const HttpFixture& fixture, int receive_buffer_bytes = 0);
  ~RawClient();
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  // Sends all of it; false when the server has closed.
  bool Send(std::string_view bytes);

  // The next response, whole. `has_body`: false after HEAD.
  RawResponse Read(bool has_body = true);

  // Reads until `text` has arrived, in what was not taken by Read.
  void ReadUntil(const std::string& text);

  bool WaitForClose();  // true when the server closes without sending more
  void Close();         // ours

  static std::string Get(const std::string& path, const std::string& headers = "");
  static std::string Post(const std::string& path, const std::string& body,
                          const std::string& headers = "");

 private:
  bool ReceiveMore();

  int socket_ = -1;
  std::string buffer_;
};

// {"prompt": "hi", ...}
std::string CompletionJson(const std::string& more = "");

}  // namespace gloam
