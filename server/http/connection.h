// HttpConnection: one client's socket: HTTP/1.1 with keep-alive and pipelining, limits and
// deadlines on everything that a client controls, and detection of its going away in every state.
// Keeps itself alive while an operation is pending; everything runs on its strand.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "boost/asio/ip/tcp.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/core/tcp_stream.hpp"
#include "boost/beast/http/parser.hpp"
#include "server/http/body.h"
#include "server/http/types.h"

namespace gloam {

struct HttpLimits {
  size_t max_header_bytes = 64 << 10;
  uint64_t max_body_bytes = 8 << 20;
  int64_t max_bodies_bytes = int64_t{256} << 20;     // of all requests being read or handled
  std::chrono::milliseconds header_timeout{10'000};  // from a request's first byte to its headers
  std::chrono::milliseconds body_timeout{60'000};    // from the headers to the body's end
  std::chrono::milliseconds idle_timeout{75'000};    // between requests
  std::chrono::milliseconds write_timeout{30'000};   // for a piece of at most 64 KiB to be taken
};

class HttpConnection;

// Shared by all connections of a server. Any thread.
struct HttpShared {
  HttpLimits limits;
  HttpHandler* handler = nullptr;
  std::string allowed_origin;  // value of Access-Control-Allow-Origin; empty: not sent
  std::atomic<int64_t> body_bytes{0};
  std::atomic<int> connections{0};
  std::atomic<int> active_exchanges{0};  // requests whose answer is not wholly sent
  std::atomic<bool> closing{false};      // answers say "Connection: close"
  std::mutex mutex;
  std::unordered_map<HttpConnection*, std::weak_ptr<HttpConnection>> open;  // guarded by mutex
};

class HttpConnection : public HttpExchange, public std::enable_shared_from_this<HttpConnection> {
 public:
  // `socket`'s executor must be a strand. Counts itself in `shared` until it is destroyed.
  HttpConnection(boost::asio::ip::tcp::socket socket, std::shared_ptr<HttpShared> shared);
  ~HttpConnection() override;

  void Start();                        // reads requests until either side closes
  void Refuse(HttpResponse response);  // answers without reading anything, then closes
  void Close();                        // as if the client had gone; any thread

  boost::asio::any_io_executor executor() override { return stream_.get_executor(); }
  void Respond(HttpResponse response) override;
  void BeginStream(std::function<void()> on_written) override;
  void WriteStream(std::string bytes, bool last) override;
  void SetOnDisconnect(std::function<void()> on_disconnect) override;

 private:
  using Error = boost::beast::error_code;
  using Parser = boost::beast::http::request_parser<CountedBody>;

  enum class State {
    kReading,     // waiting for a request or reading it
    kHandling,    // the handler has it, nothing sent yet
    kResponding,  // writing a whole response
    kStreaming,   // the head of a stream is out
    kLingering,   // answered, our side is shut: reads away what the client still sends
    kClosed,
  };

  void WaitForRequest();
  void ReadHeader();
  void OnHeader(Error error);
  void ContinueBody();
  void ReadBody();
  void OnBody(Error error);
  void Dispatch();
  void Reject(Error error);
  void RejectWith(int status, std::string message, std::string code = "");

  void Watch();
  void OnWatched(Error error, size_t bytes);
  void Write(std::string bytes, bool ends_exchange);
  void WriteSome(size_t offset);
  void OnWritten(Error error, size_t offset, size_t bytes);
  void FinishExchange();
  void Linger();
  void LingerRead();
  void Disconnect();
  std::string Head(int status, const HttpHeaders& headers);

  const std::shared_ptr<HttpShared> shared_;
  boost::beast::tcp_stream stream_;
  boost::beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  State state_ = State::kReading;
  std::chrono::steady_clock::time_point arrived_;  // when the request's first byte did
  std::string request_id_;
  bool head_request_ = false;  // HEAD: the body stays out
  bool keep_alive_ = false;
  bool chunked_ = false;   // the stream's framing: false for HTTP/1.0
  bool watching_ = false;  // a read that looks for the client's going away is pending
  bool writing_ = false;
  bool ends_exchange_ = false;  // the pending write is the exchange's last
  std::chrono::steady_clock::time_point linger_end_;
  size_t lingered_bytes_ = 0;
  std::string out_;
  std::function<void()> on_written_;
  std::function<void()> on_disconnect_;
};

}  // namespace gloam
