#include "server/http/client.h"

#include <array>
#include <utility>

#include "boost/asio/connect.hpp"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/beast/core/flat_buffer.hpp"
#include "boost/beast/http.hpp"
#include "nlohmann/json.hpp"

namespace gloam {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;

namespace {

// The message of an OpenAI error body, else the start of whatever came.
Status ErrorOf(int status, const std::string& body) {
  const auto parsed = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_object() && parsed.contains("error") && parsed["error"].is_object()) {
    return Unavailable("the server answered {}: {}", status,
                       parsed["error"].value("message", std::string()));
  }
  return Unavailable("the server answered {}: {}", status, body.substr(0, 200));
}

Status Broken(const boost::system::error_code& error) {
  return Unavailable("the connection to the server broke: {}", error.message());
}

// Splits a stream of bytes into events and passes on their data.
class EventSplitter {
 public:
  void Add(std::string_view bytes, const std::function<void(std::string_view)>& on_event) {
    rest_ += bytes;
    size_t begin = 0;
    for (size_t end; (end = rest_.find("\n\n", begin)) != rest_.npos; begin = end + 2) {
      std::string_view event = std::string_view(rest_).substr(begin, end - begin);
      constexpr std::string_view kData = "data: ";
      if (event.substr(0, kData.size()) != kData) continue;
      event.remove_prefix(kData.size());
      if (event != "[DONE]") on_event(event);
    }
    rest_.erase(0, begin);
  }

 private:
  std::string rest_;
};

}  // namespace

struct HttpClient::Impl {
  http::request<http::string_body> Request(http::verb verb, const std::string& path) const {
    http::request<http::string_body> request(verb, path, 11);
    request.set(http::field::host, host);
    if (!api_key.empty()) request.set(http::field::authorization, "Bearer " + api_key);
    return request;
  }

  http::request<http::string_body> PostOf(const std::string& path, const std::string& body) const {
    auto request = Request(http::verb::post, path);
    request.set(http::field::content_type, "application/json");
    request.body() = body;
    request.prepare_payload();
    return request;
  }

  // Sends the request and reads the whole answer.
  StatusOr<std::string> Exchange(const http::request<http::string_body>& request) {
    boost::system::error_code error;
    http::write(socket, request, error);
    http::response_parser<http::string_body> parser;
    parser.body_limit(boost::none);
    if (!error) http::read(socket, buffer, parser, error);
    if (error) return Broken(error);
    const auto status = static_cast<int>(parser.get().result_int());
    if (status != 200) return ErrorOf(status, parser.get().body());
    return std::move(parser.get().body());
  }

  std::string host;
  std::string api_key;
  asio::io_context context;
  tcp::socket socket{context};
  boost::beast::flat_buffer buffer;
};

HttpClient::HttpClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpClient::~HttpClient() = default;

StatusOr<std::unique_ptr<HttpClient>> HttpClient::Connect(const std::string& url,
                                                          std::string api_key) {
  if (!IsUrl(url)) return InvalidArgument("'{}' is not http://HOST[:PORT]", url);
  const size_t begin = std::string_view("http://").size();
  const std::string authority = url.substr(begin, url.find('/', begin) - begin);
  const size_t colon = authority.rfind(':');
  const bool has_port = colon != authority.npos && authority.find(']', colon) == authority.npos;
  auto impl = std::make_unique<Impl>();
  impl->host = authority;
  impl->api_key = std::move(api_key);
  std::string host = has_port ? authority.substr(0, colon) : authority;
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  boost::system::error_code error;
  tcp::resolver resolver(impl->context);
  const auto endpoints =
      resolver.resolve(host, has_port ? authority.substr(colon + 1) : "80", error);
  if (!error) asio::connect(impl->socket, endpoints, error);
  if (error) return Unavailable("no server at {}: {}", url, error.message());
  impl->socket.set_option(tcp::no_delay(true), error);
  return std::unique_ptr<HttpClient>(new HttpClient(std::move(impl)));
}

StatusOr<std::string> HttpClient::Get(const std::string& path) {
  return impl_->Exchange(impl_->Request(http::verb::get, path));
}

StatusOr<std::string> HttpClient::Post(const std::string& path, const std::string& body) {
  return impl_->Exchange(impl_->PostOf(path, body));
}

Status HttpClient::PostForEvents(const std::string& path, const std::string& body,
                                 const std::function<void(std::string_view)>& on_event) {
  boost::system::error_code error;
  http::write(impl_->socket, impl_->PostOf(path, body), error);
  http::response_parser<http::buffer_body> parser;
  parser.body_limit(boost::none);
  if (!error) http::read_header(impl_->socket, impl_->buffer, parser, error);
  if (error) return Broken(error);
  const auto status = static_cast<int>(parser.get().result_int());
  std::string whole;  // of an error
  EventSplitter events;
  std::array<char, 16384> piece;
  while (!parser.is_done()) {
    parser.get().body().data = piece.data();
    parser.get().body().size = piece.size();
    http::read_some(impl_->socket, impl_->buffer, parser, error);
    if (error == http::error::need_buffer) error = {};
    if (error) return Broken(error);
    const std::string_view bytes(piece.data(), piece.size() - parser.get().body().size);
    if (status == 200) {
      events.Add(bytes, on_event);
    } else {
      whole += bytes;
    }
  }
  return status == 200 ? OkStatus() : ErrorOf(status, whole);
}

}  // namespace gloam
