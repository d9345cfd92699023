// The transport: malformed requests, limits, deadlines, keys, routes.
#include <string>

#include "catch2/catch.hpp"
#include "http_fixture.h"

namespace gloam {
namespace {

using std::chrono::milliseconds;

TEST_CASE("Routes, methods and headers") {
  HttpFixture f;
  RawClient client(f);
  for (const char* path :
       {"/health", "/ready", "/live", "/version", "/metrics", "/v1/models", "/v1/models/m",
        "/v1/sparsity/policies", "/openapi.json", "/docs", "/", "/health?x=1"}) {
    INFO(path);
    REQUIRE(client.Send(RawClient::Get(path)));
    const RawResponse response = client.Read();
    CHECK(response.status == 200);
    CHECK(response.headers.at("connection") == "keep-alive");
    CHECK_FALSE(response.headers.at("x-request-id").empty());
    CHECK_FALSE(response.headers.at("openai-processing-ms").empty());
    CHECK_FALSE(response.body.empty());
  }
  client.Send(RawClient::Get("/v1/models"));
  const auto models = client.Read().Json();
  CHECK(models["object"] == "list");
  CHECK(models["data"][0]["id"] == "m");
  CHECK(models["data"][0]["max_model_len"] == 1024);
  client.Send(RawClient::Get("/openapi.json"));
  CHECK(client.Read().Json()["paths"].contains("/v1/chat/completions"));

  client.Send(RawClient::Get("/v1/models/gpt-4"));
  RawResponse response = client.Read();
  CHECK(response.status == 404);
  CHECK(response.Json()["error"]["code"] == "model_not_found");
  CHECK(response.Json()["error"]["param"] == "model");
  client.Send(RawClient::Get("/nothing"));
  CHECK(client.Read().status == 404);
  client.Send(RawClient::Get("/v1/completions"));
  response = client.Read();
  CHECK(response.status == 405);
  CHECK(response.headers.at("allow") == "POST, OPTIONS");
  client.Send("DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n");
  CHECK(client.Read().headers.at("allow") == "GET, HEAD, OPTIONS");
  client.Send("HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n");
  CHECK(client.Read(/*has_body=*/false).status == 200);
  client.Send("OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n");
  response = client.Read();
  CHECK(response.status == 204);
  CHECK(response.headers.count("access-control-allow-origin") == 0);
}

TEST_CASE("The list of policies: bodies that a request may send, reasons where one cannot") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Get("/v1/sparsity/policies"));
  const nlohmann::json list = client.Read().Json();
  CHECK(list["object"] == "list");
  CHECK(list["default"] == "dense");
  CHECK(list["data"].size() == f.service->policies().policies().size());
  CHECK(list["data"][0]["name"] == "dense");
  CHECK(list["data"][0]["is_default"] == true);
  for (const auto& policy : list["data"]) {
    INFO(policy.dump());
    const bool usable = policy["usable"];
    CHECK(usable == policy["reason"].is_null());
    CHECK(usable == (policy["policy"]["selector"]["type"] != "ds"));
    client.Send(RawClient::Post("/v1/completions",
                                CompletionJson(", \"sparsity\": " + policy["policy"].dump())));
    if (!usable) {
      const RawResponse refused = client.Read();
      CHECK(refused.status == 400);
      CHECK(refused.Json()["error"]["param"] == "sparsity.selector.config_path");
      continue;
    }
    const RequestHandle handle = f.engine.WaitForRequest();
    f.engine.Finish(handle);
    f.engine.End(handle);
    CHECK(client.Read().status == 200);
  }
}

TEST_CASE("Pipelined requests are answered in order") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Get("/version") + RawClient::Get("/nothing") +
              RawClient::Get("/v1/models"));
  CHECK(client.Read().status == 200);
  CHECK(client.Read().status == 404);
  CHECK(client.Read().Json()["object"] == "list");
}

TEST_CASE("Request ids are echoed when they are sane") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Get("/health", "X-Request-Id: abc-123\r\n"));
  CHECK(client.Read().headers.at("x-request-id") == "abc-123");
  client.Send(RawClient::Get("/health", "X-Request-Id: a b\x01\r\n"));
  CHECK(client.Read().headers["x-request-id"].find(' ') == std::string::npos);
  RawClient other(f);
  other.Send(RawClient::Get("/health", "X-Request-Id: " + std::string(200, 'a') + "\r\n"));
  CHECK(other.Read().headers.at("x-request-id").size() <= 128);
}

TEST_CASE("Keys are asked for on every route but the probes") {
  ApiRoutesOptions api;
  api.api_keys = {"secret", "other"};
  HttpFixture f({}, api);
  RawClient client(f);
  for (const char* path : {"/health", "/ready", "/live"}) {
    client.Send(RawClient::Get(path));
    CHECK(client.Read().status == 200);
  }
  for (const char* path : {"/v1/models", "/metrics", "/", "/openapi.json", "/nothing"}) {
    for (const char* header : {"", "Authorization: Bearer wrong\r\n", "Authorization: secret\r\n",
                               "Authorization: Bearer \r\n"}) {
      client.Send(RawClient::Get(path, header));
      const RawResponse response = client.Read();
      CHECK(response.status == 401);
      CHECK(response.Json()["error"]["code"] == "invalid_api_key");
    }
  }
  client.Send(RawClient::Get("/v1/models", "Authorization: Bearer other\r\n"));
  CHECK(client.Read().status == 200);
}

TEST_CASE("Only JSON is taken") {
  HttpFixture f;
  RawClient client(f);
  const std::string body = "{}";
  for (const char* type : {"text/plain", "application/x-www-form-urlencoded", ""}) {
    client.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: " + std::string(type) +
                "\r\nContent-Length: 2\r\n\r\n{}");
    CHECK(client.Read().status == 415);
  }
  client.Send(
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: Application/JSON; "
      "charset=utf-8\r\nContent-Length: 16\r\n\r\n{\"prompt\": \"ab\"}");
  const RawResponse response = client.Read();
  CHECK(response.status == 200);
  CHECK(response.Json()["tokens"] == nlohmann::json::array({97, 98}));
  CHECK(response.Json()["count"] == 2);
}

// Sends bytes and expects an answer with this status (0: none), then the connection's end.
void ExpectAnswerAndClose(const HttpFixture& f, const std::string& bytes, int status) {
  INFO(bytes.substr(0, 200));
  RawClient client(f);
  client.Send(bytes);
  const RawResponse response = client.Read();
  CHECK(response.status == status);
  if (status == 0) return;
  CHECK(response.headers.at("connection") == "close");
  CHECK(response.Json()["error"].size() == 4);
  CHECK(client.WaitForClose());
}

TEST_CASE("Malformed HTTP is answered 400 and the connection closed") {
  HttpFixture f;
  const std::string post =
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
  const std::string bad[] = {
      post + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
      post + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
      post + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
      post + "Content-Length: x\r\n\r\n{}",
      post + "Content-Length: -1\r\n\r\n{}",
      post + "Transfer-Encoding: gzip\r\n\r\n",
      post + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
      post + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
      post + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}X\r\n0\r\n\r\n",
      "GET /health HTTP/1.1\nHost: x\n\n",
      "GET /health HTTP/1.1\r\nHost: x\nFoo: y\r\n\r\n",
      "GET /health HTTP/1.1\r\n\r\n",
      "GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
      "GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
      "GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
      "GET  HTTP/1.1\r\nHost: x\r\n\r\n",
      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
      std::string("GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 29),
      "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http\r\n\r\n",
  };
  for (const std::string& bytes : bad) ExpectAnswerAndClose(f, bytes, 400);
  RawClient client(f);  // and the server lives
  client.Send(RawClient::Get("/health"));
  CHECK(client.Read().status == 200);
}

TEST_CASE("Sizes are limited") {
  HttpServerOptions http;
  http.limits.max_body_bytes = 100000;
  HttpFixture f(http);
  ExpectAnswerAndClose(f, RawClient::Get("/health", "A: " + std::string(70000, 'a') + "\r\n"), 431);
  std::string many;
  for (int i = 0; i < 20000; ++i) many += "A: b\r\n";
  ExpectAnswerAndClose(f, RawClient::Get("/health", many), 431);
  ExpectAnswerAndClose(f, "GET /" + std::string(70000, 'a') + " HTTP/1.1\r\nHost: x\r\n\r\n", 431);
  ExpectAnswerAndClose(f, RawClient::Post("/tokenize", std::string(100001, ' ')), 413);
  ExpectAnswerAndClose(f,
                       "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n20000\r\n" +
                           std::string(0x20000, ' ') + "\r\n0\r\n\r\n",
                       413);
  RawClient client(f);
  client.Send(RawClient::Post("/tokenize", R"({"prompt": "a"})" + std::string(90000, ' ')));
  CHECK(client.Read().status == 200);
}

TEST_CASE("A body in one-byte chunks is served") {
  HttpFixture f;
  RawClient client(f);
  client.Send(
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n");
  const std::string body = R"({"prompt": "ab"})" + std::string(100000, ' ');
  std::string chunks;
  for (const char c : body) chunks += std::string("1\r\n") + c + "\r\n";
  client.Send(chunks + "0\r\n\r\n");
  CHECK(client.Read().Json()["count"] == 2);
}

TEST_CASE("Bodies of all connections share a budget") {
  HttpServerOptions http;
  http.limits.max_bodies_bytes = 150000;
  HttpFixture f(http);
  RawClient first(f);
  first.Send(
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
      "Expect: 100-continue\r\nContent-Length: 120000\r\n\r\n");
  first.ReadUntil("HTTP/1.1 100 Continue\r\n\r\n");
  CHECK(first.Read(/*has_body=*/false).status == 100);
  first.Send(std::string(100000, ' '));
  RawResponse refused;  // as soon as the first body was read
  while (refused.status != 503) {
    RawClient second(f);
    second.Send(RawClient::Post("/tokenize", R"({"prompt": "a"})" + std::string(80000, ' ')));
    refused = second.Read();
    REQUIRE((refused.status == 200 || refused.status == 503));
  }
  CHECK(refused.headers.count("retry-after") == 1);
  first.Close();
  int status = 0;
  while (status != 200) {
    RawClient third(f);
    third.Send(RawClient::Post("/tokenize", R"({"prompt": "a"})" + std::string(80000, ' ')));
    status = third.Read().status;
    REQUIRE((status == 200 || status == 503));
  }
}

TEST_CASE("Slow headers, slow bodies and idle connections end at their deadlines") {
  HttpServerOptions http;
  http.limits.header_timeout = milliseconds(50);
  http.limits.body_timeout = milliseconds(50);
  http.limits.idle_timeout = milliseconds(50);
  HttpFixture f(http);
  RawClient idle(f), header(f), body(f);
  header.Send("GET /health HTTP/1.1\r\nHo");
  body.Send(
      "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
      "Content-Length: 100\r\n\r\n{");
  CHECK(idle.WaitForClose());
  CHECK(header.WaitForClose());
  CHECK(body.WaitForClose());
}

TEST_CASE("Connections over the limit are told so") {
  HttpServerOptions http;
  http.max_connections = 2;
  HttpFixture f(http);
  RawClient first(f), second(f);
  for (RawClient* client : {&first, &second}) {
    client->Send(RawClient::Get("/health"));
    CHECK(client->Read().status == 200);
  }
  const RawResponse response = RawClient(f).Read();
  CHECK(response.status == 503);
  CHECK(response.headers.count("retry-after") == 1);
  CHECK(response.Json()["error"]["code"] == "server_is_overloaded");
  first.Close();
  int status = 0;
  while (status != 200) {
    RawClient next(f);
    next.Send(RawClient::Get("/health"));
    status = next.Read().status;
    REQUIRE((status == 200 || status == 503));
  }
}

TEST_CASE("Loading and draining") {
  HttpFixture f;
  ApiRoutes loading({});
  HttpServerOptions http;
  http.port = 0;
  {
    RawClient client(f);
    f.routes->SetDraining();
    for (const char* path : {"/ready", "/health"}) {
      client.Send(RawClient::Get(path));
      CHECK(client.Read().status == 503);
    }
    client.Send(RawClient::Get("/live"));
    CHECK(client.Read().status == 200);
    client.Send(RawClient::Post("/v1/completions", CompletionJson()));
    const RawResponse response = client.Read();
    CHECK(response.status == 503);
    CHECK(response.headers.count("retry-after") == 1);
  }
  f.server = *HttpServer::Start(http, loading);
  RawClient client(f);
  client.Send(RawClient::Get("/ready"));
  CHECK(client.Read().status == 503);
  client.Send(RawClient::Get("/live"));
  CHECK(client.Read().status == 200);
  client.Send(RawClient::Get("/v1/models"));
  CHECK(client.Read().status == 503);
  f.server.reset();
}

TEST_CASE("Browsers of one allowed origin") {
  HttpServerOptions http;
  http.allowed_origin = "https://example.org";
  ApiRoutesOptions api;
  api.allowed_origin = http.allowed_origin;
  api.api_keys = {"k"};
  HttpFixture f(http, api);
  RawClient client(f);
  client.Send("OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nOrigin: https://example.org\r\n\r\n");
  const RawResponse response = client.Read();
  CHECK(response.status == 204);
  CHECK(response.headers.at("access-control-allow-origin") == "https://example.org");
  CHECK(response.headers.at("access-control-allow-methods") == "POST, OPTIONS");
}

}  // namespace
}  // namespace gloam
