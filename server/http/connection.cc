#include "server/http/connection.h"

#include <algorithm>
#include <ctime>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/logging.h"
#include "boost/asio/post.hpp"
#include "boost/beast/http/read.hpp"
#include "server/api_error.h"
#include "server/openai/responses.h"

namespace gloam {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;

namespace {

constexpr size_t kReadBytes = 4096;
constexpr size_t kWriteBytes = 64 << 10;  // the piece that the write deadline is for
constexpr size_t kMaxLingerBytes = 4 << 20;
constexpr std::chrono::seconds kLingerTime{2};
// A reader that stops costs at most this much kernel memory (the kernel doubles it).
constexpr int kSendBufferBytes = 128 << 10;

std::string_view View(beast::string_view text) { return {text.data(), text.size()}; }

std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[40];
  const size_t size = std::strftime(text, sizeof(text), "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return std::string(text, size);
}

int HexValue(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The target's path, without scheme, host and query, percent escapes decoded.
std::string PathOf(std::string_view target) {
  if (const size_t scheme = target.find("://"); scheme != target.npos && target[0] != '/') {
    const size_t slash = target.find('/', scheme + 3);
    target = slash == target.npos ? std::string_view("/") : target.substr(slash);
  }
  target = target.substr(0, target.find('?'));
  std::string path;
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] == '%' && i + 2 < target.size() && HexValue(target[i + 1]) >= 0 &&
        HexValue(target[i + 2]) >= 0) {
      path += static_cast<char>(HexValue(target[i + 1]) * 16 + HexValue(target[i + 2]));
      i += 2;
    } else {
      path += target[i];
    }
  }
  return path;
}

}  // namespace

HttpConnection::HttpConnection(asio::ip::tcp::socket socket, std::shared_ptr<HttpShared> shared)
    : shared_(std::move(shared)),
      stream_(std::move(socket)),
      buffer_(2 * shared_->limits.max_header_bytes) {
  shared_->connections.fetch_add(1);
  Error ignored;  // neither option is needed for a right answer
  stream_.socket().set_option(asio::ip::tcp::no_delay(true), ignored);
  stream_.socket().set_option(asio::socket_base::send_buffer_size(kSendBufferBytes), ignored);
}

HttpConnection::~HttpConnection() {
  shared_->connections.fetch_sub(1);
  std::lock_guard lock(shared_->mutex);
  shared_->open.erase(this);
}

void HttpConnection::Start() { WaitForRequest(); }

void HttpConnection::Refuse(HttpResponse response) {
  state_ = State::kHandling;
  shared_->active_exchanges.fetch_add(1);
  request_id_ = SaneRequestId("");
  arrived_ = std::chrono::steady_clock::now();
  response.close = true;
  Respond(std::move(response));
}

void HttpConnection::Close() {
  asio::post(stream_.get_executor(), [self = shared_from_this()] { self->Disconnect(); });
}

// --- Reading a request ---

void HttpConnection::WaitForRequest() {
  state_ = State::kReading;
  head_request_ = false;
  keep_alive_ = false;
  parser_.emplace();
  parser_->header_limit(static_cast<uint32_t>(shared_->limits.max_header_bytes));
  parser_->body_limit(shared_->limits.max_body_bytes);
  parser_->get().body().SetBudget(&shared_->body_bytes, shared_->limits.max_bodies_bytes);
  if (buffer_.size() > 0) {  // the client has sent its next request already
    ReadHeader();
    return;
  }
  buffer_.shrink_to_fit();
  stream_.expires_after(shared_->limits.idle_timeout);
  stream_.async_read_some(buffer_.prepare(kReadBytes),
                          [self = shared_from_this()](Error error, size_t bytes) {
                            if (error) return self->Disconnect();
                            self->buffer_.commit(bytes);
                            self->ReadHeader();
                          });
}

void HttpConnection::ReadHeader() {
  arrived_ = std::chrono::steady_clock::now();
  stream_.expires_after(shared_->limits.header_timeout);
  http::async_read_header(
      stream_, buffer_, *parser_,
      [self = shared_from_this()](Error error, size_t) { self->OnHeader(error); });
}

void HttpConnection::OnHeader(Error error) {
  if (state_ == State::kClosed) return;
  const auto& request = parser_->get();
  request_id_ = SaneRequestId(View(request["x-request-id"]));
  if (error) return Reject(error);
  if (request.version() >= 11 && request.count(http::field::host) != 1) {
    return RejectWith(400, "A request must have exactly one Host header");
  }
  if (request.count(http::field::transfer_encoding) > 0 &&
      !beast::iequals(request[http::field::transfer_encoding], "chunked")) {
    return RejectWith(400, "Transfer-Encoding must be chunked");
  }
  const auto expect = request[http::field::expect];
  if (expect.empty()) return ReadBody();
  if (!beast::iequals(expect, "100-continue")) {
    return RejectWith(417, "Expect must be 100-continue");
  }
  ContinueBody();
}

void HttpConnection::ContinueBody() {
  static constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
  stream_.expires_after(shared_->limits.write_timeout);
  // Far smaller than an empty send buffer: taken whole.
  stream_.async_write_some(asio::buffer(kContinue.data(), kContinue.size()),
                           [self = shared_from_this()](Error error, size_t bytes) {
                             if (error || bytes != kContinue.size()) return self->Disconnect();
                             self->ReadBody();
                           });
}

void HttpConnection::ReadBody() {
  if (parser_->is_done()) return Dispatch();
  stream_.expires_after(shared_->limits.body_timeout);
  http::async_read(stream_, buffer_, *parser_,
                   [self = shared_from_this()](Error error, size_t) { self->OnBody(error); });
}

void HttpConnection::OnBody(Error error) {
  if (state_ == State::kClosed) return;
  if (error) return Reject(error);
  Dispatch();
}

void HttpConnection::Reject(Error error) {
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    if (parser_->is_header_done()) {
      return RejectWith(503, "The server is receiving too much at once, please try again",
                        std::string(kOverloadedCode));
    }
    return RejectWith(
        431, fmt::format("The headers are larger than {} bytes", shared_->limits.max_header_bytes));
  }
  if (error == http::error::body_limit) {
    return RejectWith(413, fmt::format("The body is larger than {} bytes (--max-body-bytes)",
                                       shared_->limits.max_body_bytes));
  }
  // Faults of the connection have nobody to answer; those of the parser do.
  if (error.category() != http::make_error_code(http::error::bad_method).category() ||
      error == http::error::end_of_stream || error == http::error::partial_message) {
    return Disconnect();
  }
  RejectWith(400, fmt::format("The HTTP request is malformed: {}", error.message()));
}

void HttpConnection::RejectWith(int status, std::string message, std::string code) {
  Status fault = status == 503 ? Unavailable("{}", message) : InvalidArgument("{}", message);
  if (!code.empty()) fault = WithErrorCode(std::move(fault), code);
  HttpResponse response;
  response.status = status;
  response.body = ErrorBody(fault);
  response.close = true;
  if (status == 503) response.headers.emplace_back("Retry-After", "1");
  state_ = State::kHandling;
  shared_->active_exchanges.fetch_add(1);
  Respond(std::move(response));
}

void HttpConnection::Dispatch() {
  auto& message = parser_->get();
  HttpRequest request;
  request.method = std::string(View(message.method_string()));
  request.path = PathOf(View(message.target()));
  request.authorization = std::string(View(message[http::field::authorization]));
  request.content_type = std::string(View(message[http::field::content_type]));
  request.id = request_id_;
  request.body = std::move(message.body().text());
  head_request_ = message.method() == http::verb::head;
  keep_alive_ = message.keep_alive();
  chunked_ = message.version() >= 11;
  state_ = State::kHandling;
  shared_->active_exchanges.fetch_add(1);
  shared_->handler->Handle(std::move(request), shared_from_this());
  if (state_ == State::kHandling || state_ == State::kStreaming) Watch();
}

// --- Noticing that the client goes away while an answer is made ---

void HttpConnection::Watch() {
  if (watching_) return;
  // No honest client pipelines this much; without reading on, its going away would stay unseen.
  if (buffer_.size() >= shared_->limits.max_header_bytes) return Disconnect();
  watching_ = true;
  stream_.expires_never();  // of the read; a pending write keeps its deadline
  stream_.async_read_some(
      buffer_.prepare(kReadBytes),
      [self = shared_from_this()](Error error, size_t bytes) { self->OnWatched(error, bytes); });
}

void HttpConnection::OnWatched(Error error, size_t bytes) {
  watching_ = false;
  if (state_ == State::kClosed) return;
  if (!error) buffer_.commit(bytes);
  if (state_ == State::kReading) {  // FinishExchange waited for this read to end
    if (error && error != asio::error::operation_aborted) return Disconnect();
    return WaitForRequest();
  }
  if (state_ == State::kLingering) return LingerRead();
  if (error) return Disconnect();
  Watch();
}

// --- Answering ---

void HttpConnection::SetOnDisconnect(std::function<void()> on_disconnect) {
  if (state_ == State::kClosed) return on_disconnect();
  on_disconnect_ = std::move(on_disconnect);
}

std::string HttpConnection::Head(int status, const HttpHeaders& headers) {
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::steady_clock::now() - arrived_);
  std::string head = fmt::format(
      "HTTP/1.1 {} {}\r\nServer: gloam\r\nDate: {}\r\nx-request-id: {}\r\n"
      "openai-processing-ms: {}\r\n",
      status, HttpReason(status), HttpDate(), request_id_, elapsed.count());
  for (const auto& [name, value] : headers) head += fmt::format("{}: {}\r\n", name, value);
  if (!shared_->allowed_origin.empty()) {
    head += fmt::format("Access-Control-Allow-Origin: {}\r\n", shared_->allowed_origin);
  }
  head += keep_alive_ ? "Connection: keep-alive\r\n" : "Connection: close\r\n";
  return head;
}

void HttpConnection::Respond(HttpResponse response) {
  if (state_ != State::kHandling) return;
  state_ = State::kResponding;
  if (response.close || shared_->closing.load()) keep_alive_ = false;
  std::string bytes = Head(response.status, response.headers);
  if (response.status != 204) {
    bytes += fmt::format("Content-Type: {}\r\nContent-Length: {}\r\n", response.content_type,
                         response.body.size());
  }
  bytes += "\r\n";
  if (!head_request_) bytes += response.body;
  Write(std::move(bytes), /*ends_exchange=*/true);
}

void HttpConnection::BeginStream(std::function<void()> on_written) {
  if (state_ != State::kHandling) return;
  state_ = State::kStreaming;
  on_written_ = std::move(on_written);
  if (!chunked_ || shared_->closing.load()) keep_alive_ = false;
  out_ = Head(200, {{"Content-Type", "text/event-stream; charset=utf-8"},
                    {"Cache-Control", "no-cache"},
                    {"X-Accel-Buffering", "no"}});
  if (chunked_) out_ += "Transfer-Encoding: chunked\r\n";
  out_ += "\r\n";  // goes out with the first events
}

void HttpConnection::WriteStream(std::string bytes, bool last) {
  if (state_ != State::kStreaming) return;
  if (chunked_) {
    if (!bytes.empty()) out_ += fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes);
    if (last) out_ += "0\r\n\r\n";
  } else {
    out_ += bytes;
  }
  Write(std::move(out_), last);
}

void HttpConnection::Write(std::string bytes, bool ends_exchange) {
  GLOAM_CHECK(!writing_);
  writing_ = true;
  ends_exchange_ = ends_exchange;
  out_ = std::move(bytes);
  WriteSome(0);
}

void HttpConnection::WriteSome(size_t offset) {
  const size_t piece = std::min(kWriteBytes, out_.size() - offset);
  stream_.expires_after(shared_->limits.write_timeout);
  stream_.async_write_some(asio::buffer(out_.data() + offset, piece),
                           [self = shared_from_this(), offset](Error error, size_t bytes) {
                             self->OnWritten(error, offset, bytes);
                           });
}

void HttpConnection::OnWritten(Error error, size_t offset, size_t bytes) {
  if (state_ == State::kClosed) return;
  if (error) return Disconnect();
  if (offset + bytes < out_.size()) return WriteSome(offset + bytes);
  writing_ = false;
  out_.clear();
  if (ends_exchange_) return FinishExchange();
  if (on_written_) on_written_();
}

void HttpConnection::FinishExchange() {
  on_written_ = nullptr;
  on_disconnect_ = nullptr;
  shared_->active_exchanges.fetch_sub(1);
  state_ = State::kReading;
  if (!keep_alive_) return Linger();
  if (watching_) {
    stream_.cancel();  // OnWatched goes on
  } else {
    WaitForRequest();
  }
}

// Closing a socket whose receive buffer holds data resets the connection, and the client may lose
// the answer: end our side, then read away what it still sends, within limits.
void HttpConnection::Linger() {
  state_ = State::kLingering;
  Error error;
  stream_.socket().shutdown(asio::ip::tcp::socket::shutdown_send, error);
  if (error) return Disconnect();
  linger_end_ = std::chrono::steady_clock::now() + kLingerTime;
  if (watching_) {
    stream_.cancel();  // OnWatched goes on
  } else {
    LingerRead();
  }
}

void HttpConnection::LingerRead() {
  buffer_.clear();
  stream_.expires_at(linger_end_);
  stream_.async_read_some(buffer_.prepare(kReadBytes),
                          [self = shared_from_this()](Error error, size_t bytes) {
                            self->lingered_bytes_ += bytes;
                            if (error || self->lingered_bytes_ > kMaxLingerBytes) {
                              return self->Disconnect();
                            }
                            self->LingerRead();
                          });
}

void HttpConnection::Disconnect() {
  if (state_ == State::kClosed) return;
  if (state_ != State::kReading && state_ != State::kLingering) {
    shared_->active_exchanges.fetch_sub(1);
  }
  state_ = State::kClosed;
  stream_.close();
  on_written_ = nullptr;
  if (const auto on_disconnect = std::exchange(on_disconnect_, nullptr)) on_disconnect();
}

}  // namespace gloam
