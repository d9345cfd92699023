// Generation over HTTP: shapes of answers and streams, disconnects, slow readers, many streams.
#include <atomic>
#include <string>
#include <thread>

#include "catch2/catch.hpp"
#include "http_fixture.h"
#include "models/attention/policy_json.h"

namespace gloam {
namespace {

using nlohmann::json;

// The data of every event but the last, which must be [DONE].
std::vector<json> EventsOf(const std::string& body) {
  std::vector<json> events;
  bool done = false;
  for (size_t begin = 0; begin < body.size();) {
    const size_t end = body.find("\n\n", begin);
    REQUIRE(end != body.npos);
    const std::string event = body.substr(begin, end - begin);
    REQUIRE(event.rfind("data: ", 0) == 0);
    REQUIRE_FALSE(done);
    done = event == "data: [DONE]";
    if (!done) events.push_back(json::parse(event.substr(6)));
    begin = end + 2;
  }
  CHECK(done);
  return events;
}

std::string ChatJson(const std::string& more = "") {
  return R"({"model": "m", "messages": [{"role": "user", "content": "hi"}])" + more + "}";
}

// Runs the one request that the client has sent: this text, then the end.
void Answer(HttpFixture& f, const std::string& text, FinishReason reason = FinishReason::kStop) {
  const RequestHandle handle = f.engine.WaitForRequest();
  if (f.engine.request(handle).sampling.num_prompt_logprobs >= 0) {
    f.engine.PushPromptLogprobs(handle);
  }
  for (int i = 0; i < f.engine.request(handle).n; ++i) {
    if (!text.empty()) f.engine.Push(handle, text, i);
    f.engine.Finish(handle, reason, i);
  }
  f.engine.End(handle, {.prompt_tokens = 2, .completion_tokens = 3, .cached_tokens = 1});
}

const json kUsage = {{"prompt_tokens", 2},
                     {"completion_tokens", 3},
                     {"total_tokens", 5},
                     {"prompt_tokens_details", {{"cached_tokens", 1}}}};

TEST_CASE("A whole completion") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/completions", CompletionJson()));
  Answer(f, "yes", FinishReason::kLength);
  json body = client.Read().Json();
  CHECK(body["id"].get<std::string>().rfind("cmpl-", 0) == 0);
  CHECK(body["created"].is_number_integer());
  CHECK(body["system_fingerprint"].is_string());
  body.erase("id");
  body.erase("created");
  body.erase("system_fingerprint");
  CHECK(body == json({{"object", "text_completion"},
                      {"model", "m"},
                      {"choices",
                       {{{"index", 0},
                         {"text", "yes"},
                         {"logprobs", nullptr},
                         {"finish_reason", "length"},
                         {"stop_reason", nullptr}}}},
                      {"usage", kUsage}}));
}

TEST_CASE("A whole chat answer") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/chat/completions", ChatJson()));
  Answer(f, "yes");
  const json body = client.Read().Json();
  CHECK(body["object"] == "chat.completion");
  CHECK(
      body["choices"] ==
      json::array({{{"index", 0},
                    {"message", {{"role", "assistant"}, {"content", "yes"}, {"refusal", nullptr}}},
                    {"logprobs", nullptr},
                    {"finish_reason", "stop"},
                    {"stop_reason", nullptr}}}));
  CHECK(body["usage"] == kUsage);
}

TEST_CASE("Log-probabilities in both shapes") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/chat/completions",
                              ChatJson(R"(, "logprobs": true, "top_logprobs": 2)")));
  Answer(f, "a");
  CHECK(client.Read().Json()["choices"][0]["logprobs"] ==
        json::parse(R"({"content": [{"token": "a", "logprob": -0.5, "bytes": [97],
          "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]},
                           {"token": "b", "logprob": -1.5, "bytes": [98]}]}], "refusal": null})"));

  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "echo": true, "logprobs": 1,
                                                 "prompt_logprobs": 0)")));
  Answer(f, "\xc3\xa9");  // two tokens, each half a character
  const json choice = client.Read().Json()["choices"][0];
  CHECK(choice["text"] == "hi\xc3\xa9");
  CHECK(choice["logprobs"] == json::parse(R"({"tokens": ["h", "i", "bytes:\\xc3", "bytes:\\xa9"],
          "token_logprobs": [null, -0.5, -0.5, -0.5],
          "top_logprobs": [null, {"i": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}],
          "text_offset": [0, 1, 2, 3]})"));
  CHECK(choice["prompt_logprobs"] ==
        json::parse(R"([null, {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}}])"));
}

TEST_CASE("best_of answers with the likeliest, max_tokens 0 with the prompt alone") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "n": 2, "best_of": 3)")));
  Answer(f, "x");
  const json choices = client.Read().Json()["choices"];
  REQUIRE(choices.size() == 2);
  CHECK(choices[1]["index"] == 1);
  CHECK(choices[1]["logprobs"].is_null());

  client.Send(
      RawClient::Post("/v1/completions", CompletionJson(R"(, "echo": true, "max_tokens": 0)")));
  Answer(f, "x");
  const json body = client.Read().Json();
  CHECK(body["choices"][0]["text"] == "hi");
  CHECK(body["choices"][0]["finish_reason"] == "length");
  CHECK(body["usage"]["completion_tokens"] == 0);
}

TEST_CASE("A chat stream: role first, finish reason last, usage when asked for") {
  HttpFixture f;
  RawClient client(f);
  client.Send(
      RawClient::Post("/v1/chat/completions",
                      ChatJson(R"(, "stream": true, "stream_options": {"include_usage": true})")));
  Answer(f, "he said \"\xc3\xa9\"\n");
  const RawResponse response = client.Read();
  CHECK(response.headers.at("content-type") == "text/event-stream; charset=utf-8");
  const auto events = EventsOf(response.body);
  REQUIRE(events.size() >= 3);
  CHECK(events[0]["object"] == "chat.completion.chunk");
  CHECK(events[0]["choices"][0]["delta"] ==
        json({{"role", "assistant"}, {"content", ""}, {"refusal", nullptr}}));
  CHECK(events[0]["choices"][0]["finish_reason"].is_null());
  CHECK(events[1]["choices"][0]["delta"] == json({{"content", "he said \"\xc3\xa9\"\n"}}));
  CHECK(events[1]["choices"][0]["logprobs"].is_null());
  // The end comes with the text or, when that was sent before, in a chunk of its own.
  const json& last = events[events.size() - 2];
  CHECK(last["choices"][0]["finish_reason"] == "stop");
  CHECK_FALSE(last["choices"][0]["delta"].contains("role"));
  for (size_t i = 0; i + 1 < events.size(); ++i) {
    CHECK(events[i].contains("usage"));
    CHECK(events[i]["usage"].is_null());
  }
  CHECK(events.back()["choices"] == json::array());
  CHECK(events.back()["usage"] == kUsage);
  CHECK(events.front()["id"] == events.back()["id"]);
}

const SparsityUsage kSparsity = {.policy = "twilight",
                                 .kept_tokens_per_head = 24.5,
                                 .loaded_tokens_per_kv_head = 40,
                                 .loaded_share = 0.25,
                                 .context_tokens = 160,
                                 .sparse_steps = 3,
                                 .bypassed_steps = 1,
                                 .true_mass = std::nullopt};
const json kSparsityJson = {{"policy", "twilight"},
                            {"mean_kept_tokens_per_head", 24.5},
                            {"mean_loaded_tokens_per_kv_head", 40.0},
                            {"mean_loaded_share", 0.25},
                            {"sparse_steps", 3},
                            {"bypassed_steps", 1},
                            {"true_mass", nullptr}};

TEST_CASE("The usage says what sparse attention did, in answers and in streams") {
  HttpFixture f;
  RawClient client(f);
  const auto answer = [&](const SparsityUsage& sparsity) {
    const RequestHandle handle = f.engine.WaitForRequest();
    f.engine.Finish(handle);
    f.engine.End(handle, {.prompt_tokens = 1, .sparsity = sparsity});
    return f.engine.request(handle);
  };
  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "sparsity": "twilight")")));
  CHECK(answer(kSparsity).sparsity->name == "twilight");
  CHECK(client.Read().Json()["usage"]["sparsity"] == kSparsityJson);

  client.Send(
      RawClient::Post("/v1/chat/completions",
                      ChatJson(R"(, "sparsity": {"sink_tokens": 4, "report_true_mass": true},
                       "stream": true, "stream_options": {"include_usage": true})")));
  SparsityUsage custom = kSparsity;
  custom.policy.clear();
  custom.true_mass = 0.875;
  CHECK(answer(custom).sparsity->report_true_mass);
  const json usage = EventsOf(client.Read().body).back()["usage"]["sparsity"];
  CHECK(usage["policy"] == "custom");
  CHECK(usage["true_mass"] == 0.875);
}

TEST_CASE("What the engine cannot do of a policy names its key") {
  HttpFixture f;
  RawClient client(f);
  f.engine.Refuse(PolicyKeyError("compressor.window_size", "must be at most 64"));
  client.Send(RawClient::Post("/v1/completions", CompletionJson()));
  const RawResponse response = client.Read();
  CHECK(response.status == 400);
  const json error = response.Json()["error"];
  CHECK(error["param"] == "sparsity.compressor.window_size");
  CHECK(error["message"] == "sparsity.compressor.window_size must be at most 64");
  CHECK(error["code"].is_null());
}

TEST_CASE("The usage of several prompts is weighted by their steps") {
  HttpFixture f;
  RawClient client(f);
  client.Send(
      RawClient::Post("/v1/completions", R"({"prompt": ["a", "b"], "sparsity": "twilight"})"));
  SparsityUsage second = kSparsity;
  second.kept_tokens_per_head = 4.5;
  second.loaded_share = 0.75;
  second.sparse_steps = 1;
  second.bypassed_steps = 0;
  for (const SparsityUsage& sparsity : {kSparsity, second}) {
    const RequestHandle handle = f.engine.WaitForRequest();
    f.engine.Finish(handle);
    f.engine.End(handle, {.prompt_tokens = 1, .sparsity = sparsity});
  }
  const json usage = client.Read().Json()["usage"]["sparsity"];
  CHECK(usage["mean_kept_tokens_per_head"] == 19.5);
  CHECK(usage["mean_loaded_share"] == 0.375);
  CHECK(usage["sparse_steps"] == 4);
  CHECK(usage["bypassed_steps"] == 1);
}

TEST_CASE("A completion stream with echo, log-probabilities and two answers") {
  HttpFixture f;
  RawClient client(f);
  client.Send(
      RawClient::Post("/v1/completions",
                      CompletionJson(R"(, "stream": true, "echo": true, "logprobs": 0, "n": 2)")));
  Answer(f, "ab");
  const auto events = EventsOf(client.Read().body);
  std::string texts[2];
  std::vector<int> offsets[2];
  for (const json& event : events) {
    CHECK_FALSE(event.contains("usage"));
    const json& choice = event["choices"][0];
    const int index = choice["index"];
    texts[index] += choice["text"].get<std::string>();
    if (choice["logprobs"].is_null()) continue;  // the end may come in a chunk of its own
    for (const json& offset : choice["logprobs"]["text_offset"]) offsets[index].push_back(offset);
  }
  for (int i = 0; i < 2; ++i) {
    CHECK(texts[i] == "hiab");
    CHECK(offsets[i] == std::vector<int>{0, 1, 2, 3});
  }
}

TEST_CASE("HTTP/1.0 clients get a stream that ends with the connection") {
  HttpFixture f;
  RawClient client(f);
  const std::string body = CompletionJson(R"(, "stream": true)");
  client.Send(
      "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body);
  Answer(f, "x");
  const RawResponse response = client.Read();
  CHECK(response.headers.count("transfer-encoding") == 0);
  CHECK(EventsOf(response.body).front()["choices"][0]["text"] == "x");
}

TEST_CASE("Faults of the engine") {
  HttpFixture f;
  RawClient client(f);
  f.engine.Refuse(ResourceExhausted("the queue is full"));
  client.Send(RawClient::Post("/v1/completions", CompletionJson()));
  RawResponse response = client.Read();
  CHECK(response.status == 503);
  CHECK(response.headers.count("retry-after") == 1);
  CHECK(response.Json()["error"]["code"] == "server_is_overloaded");
  f.engine.Refuse(InvalidArgument("needs more KV cache than there is"));
  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "stream": true)")));
  CHECK(client.Read().status == 400);
  f.engine.Refuse(OkStatus());

  // Before the first token a fault is a status, after it an event.
  for (const bool stream : {false, true}) {
    client.Send(
        RawClient::Post("/v1/completions", CompletionJson(stream ? R"(, "stream": true)" : "")));
    const RequestHandle handle = f.engine.WaitForRequest();
    f.engine.Finish(handle, FinishReason::kError, 0,
                    MakeStatus(StatusCode::kDeadlineExceeded, "too late"));
    f.engine.End(handle);
    CHECK(client.Read().status == 504);
  }
  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "stream": true)")));
  const RequestHandle handle = f.engine.WaitForRequest();
  f.engine.Push(handle, "abc");
  client.ReadUntil("abc");
  f.engine.Finish(handle, FinishReason::kError, 0, Internal("broken"));
  f.engine.End(handle);
  response = client.Read();
  CHECK(response.body.find(R"("message":"broken")") != std::string::npos);
  CHECK(response.body.find("[DONE]") == std::string::npos);
}

TEST_CASE("A client that goes away cancels its request in every state") {
  HttpFixture f;
  for (const char* more :
       {"", R"(, "stream": true)", R"(, "n": 3)", R"(, "n": 3, "stream": true)"}) {
    for (const bool with_output : {false, true}) {
      INFO(more << " " << with_output);
      RawClient client(f);
      client.Send(RawClient::Post("/v1/completions", CompletionJson(more)));
      const RequestHandle handle = f.engine.WaitForRequest();
      if (with_output) f.engine.Push(handle, "x");
      client.Close();
      f.engine.WaitForCancel(handle);
      CHECK_FALSE(f.engine.Push(handle, "y"));
      f.engine.End(handle);
    }
  }
}

TEST_CASE("A client that pipelines is still watched") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/completions", CompletionJson()) + RawClient::Get("/version"));
  Answer(f, "x");
  CHECK(client.Read().Json()["object"] == "text_completion");
  CHECK(client.Read().Json().contains("version"));

  client.Send(RawClient::Post("/v1/completions", CompletionJson()) + RawClient::Get("/version"));
  const RequestHandle handle = f.engine.WaitForRequest();
  client.Close();
  f.engine.WaitForCancel(handle);
  f.engine.End(handle);
}

TEST_CASE("A reader that never reads is cancelled, by the bound or by the deadline") {
  HttpServerOptions http;
  http.limits.write_timeout = std::chrono::milliseconds(200);
  ApiRoutesOptions api;
  api.max_queued_bytes = 1 << 20;
  HttpFixture f(http, api);
  for (const bool flood : {true, false}) {
    RawClient client(f, /*receive_buffer_bytes=*/4096);
    client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "stream": true)")));
    const RequestHandle handle = f.engine.WaitForRequest();
    bool taken = true;
    for (int i = 0; flood ? taken : i < 40; ++i) {
      taken = f.engine.Push(handle, std::string(16 << 10, 'x'));
      REQUIRE(i < 10000);
    }
    if (flood) f.engine.Finish(handle, FinishReason::kCancelled);  // as the engine does then
    f.engine.WaitForCancel(handle);
    f.engine.End(handle);
  }
}

TEST_CASE("Five hundred streams at a time, some of them slow") {
  constexpr int kStreams = 500;
  HttpFixture f;
  std::vector<std::unique_ptr<RawClient>> clients;
  std::vector<RequestHandle> handles;
  for (int i = 0; i < kStreams; ++i) {
    clients.push_back(std::make_unique<RawClient>(f));
    clients.back()->Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "stream": true)")));
    handles.push_back(f.engine.WaitForRequest());
  }
  CHECK(f.server->num_connections() == kStreams);
  for (int token = 0; token < 50; ++token) {
    for (const RequestHandle handle : handles) REQUIRE(f.engine.Push(handle, "tok "));
  }
  for (const RequestHandle handle : handles) {
    f.engine.Finish(handle);
    f.engine.End(handle);
  }
  std::string expected;
  for (int token = 0; token < 50; ++token) expected += "tok ";
  for (auto& client : clients) {  // nobody read until now
    std::string text;
    for (const json& event : EventsOf(client->Read().body)) {
      text += event["choices"][0]["text"].get<std::string>();
    }
    CHECK(text == expected);
  }
}

TEST_CASE("Stopping the server cancels what runs") {
  HttpFixture f;
  RawClient client(f);
  client.Send(RawClient::Post("/v1/completions", CompletionJson(R"(, "stream": true)")));
  const RequestHandle handle = f.engine.WaitForRequest();
  f.server->Stop(std::chrono::milliseconds(0));
  CHECK(f.engine.num_cancels(handle) > 0);
  CHECK(client.WaitForClose());
  f.engine.End(handle);
}

}  // namespace
}  // namespace gloam
