#include "http_fixture.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

namespace gloam {
namespace {

constexpr timeval kPatience{60, 0};

std::string Lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return text;
}

}  // namespace

HttpFixture::HttpFixture(HttpServerOptions http, ApiRoutesOptions api) {
  auto parsed = ChatTemplate::Parse(
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}",
      "", "<eos>");
  REQUIRE(parsed.ok());
  chat_template = *std::move(parsed);
  service = std::make_unique<GenerationService>(
      GenerationServiceOptions{{"m"}, BuiltinPolicyRegistry()}, engine, tokenizer,
      chat_template.get(), GenerationDefaults());
  routes = std::make_unique<ApiRoutes>(std::move(api));
  routes->SetService(service.get(), &metrics);
  http.port = 0;
  auto started = HttpServer::Start(http, *routes);
  REQUIRE(started.ok());
  server = *std::move(started);
}

HttpFixture::~HttpFixture() { server.reset(); }

RawClient::RawClient(const HttpFixture& fixture, int receive_buffer_bytes) {
  socket_ = ::socket(AF_INET, SOCK_STREAM, 0);
  REQUIRE(socket_ >= 0);
  setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof(kPatience));
  setsockopt(socket_, SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof(kPatience));
  if (receive_buffer_bytes > 0) {
    setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(receive_buffer_bytes));
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(fixture.server->port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
}

RawClient::~RawClient() { Close(); }

void RawClient::Close() {
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

bool RawClient::Send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(sent);
  }
  return true;
}

bool RawClient::ReceiveMore() {
  char piece[16384];
  const ssize_t size = ::recv(socket_, piece, sizeof(piece), 0);
  if (size < 0) REQUIRE(errno != EAGAIN);  // a minute without an answer
  if (size <= 0) return false;
  buffer_.append(piece, size);
  return true;
}

void RawClient::ReadUntil(const std::string& text) {
  while (buffer_.find(text) == buffer_.npos) REQUIRE(ReceiveMore());
}

bool RawClient::WaitForClose() {
  if (!buffer_.empty()) return false;
  return !ReceiveMore();
}

RawResponse RawClient::Read(bool has_body) {
  RawResponse response;
  size_t head_end;
  while ((head_end = buffer_.find("\r\n\r\n")) == buffer_.npos) {
    if (!ReceiveMore()) return response;
  }
  const std::string head = buffer_.substr(0, head_end + 2);
  buffer_.erase(0, head_end + 4);
  response.status = std::stoi(head.substr(9, 3));
  for (size_t begin = head.find("\r\n") + 2; begin < head.size();) {
    const size_t end = head.find("\r\n", begin);
    const size_t colon = head.find(": ", begin);
    response.headers[Lower(head.substr(begin, colon - begin))] =
        head.substr(colon + 2, end - colon - 2);
    begin = end + 2;
  }
  if (!has_body || response.status == 204) return response;
  if (response.headers.count("content-length") > 0) {
    const size_t size = std::stoul(response.headers["content-length"]);
    while (buffer_.size() < size) REQUIRE(ReceiveMore());
    response.body = buffer_.substr(0, size);
    buffer_.erase(0, size);
  } else if (response.headers.count("transfer-encoding") > 0) {
    for (;;) {
      ReadUntil("\r\n");
      const size_t line = buffer_.find("\r\n");
      const size_t size = std::stoul(buffer_.substr(0, line), nullptr, 16);
      while (buffer_.size() < line + size + 4) REQUIRE(ReceiveMore());
      response.body += buffer_.substr(line + 2, size);
      buffer_.erase(0, line + size + 4);
      if (size == 0) break;
    }
  } else {
    while (ReceiveMore()) {
    }
    response.body = std::exchange(buffer_, {});
  }
  return response;
}

std::string RawClient::Get(const std::string& path, const std::string& headers) {
  return "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n";
}

std::string RawClient::Post(const std::string& path, const std::string& body,
                            const std::string& headers) {
  return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + headers +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

std::string CompletionJson(const std::string& more) { return R"({"prompt": "hi")" + more + "}"; }

}  // namespace gloam
