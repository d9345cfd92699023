// ApiRoutes: what the HTTP server serves: keys, routing, and every route of the API. Answers 503
// until a service is set, and again once draining. Handle runs on many threads; the setters may be
// called at any time from one.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "boost/asio/thread_pool.hpp"
#include "engine/metrics.h"
#include "server/api_keys.h"
#include "server/generation_service.h"
#include "server/http/types.h"

namespace gloam {

struct ApiRoutesOptions {
  std::vector<std::string> api_keys;
  size_t max_queued_bytes = 4 << 20;  // output that waits for one slow reader
  std::string allowed_origin;         // as in HttpServerOptions: answers preflight requests
  int request_timeout_ms = 0;         // deadline of every generation; 0: none
};

class ApiRoutes : public HttpHandler {
 public:
  explicit ApiRoutes(ApiRoutesOptions options);

  // Opens the API. Both must outlive the HTTP server.
  void SetService(GenerationService* service, const MetricsRegistry* metrics);
  void SetDraining() { draining_ = true; }

  void Handle(HttpRequest request, std::shared_ptr<HttpExchange> exchange) override;
  void Stop() override { workers_.join(); }

 private:
  enum class Access { kOpen, kKey };
  struct Route {
    const char* method;
    const char* path;  // a trailing "/*" stands for the rest of the path
    Access access;
    HttpResponse (ApiRoutes::*answer)(const HttpRequest&);  // null: a generation
  };
  static const std::vector<Route>& Routes();

  HttpResponse Ready(const HttpRequest& request);
  HttpResponse Live(const HttpRequest& request);
  HttpResponse Version(const HttpRequest& request);
  HttpResponse Metrics(const HttpRequest& request);
  HttpResponse ListModels(const HttpRequest& request);
  HttpResponse GetModel(const HttpRequest& request);
  HttpResponse Tokenize(const HttpRequest& request);
  HttpResponse Detokenize(const HttpRequest& request);
  HttpResponse SparsityPolicies(const HttpRequest& request);
  HttpResponse OpenApi(const HttpRequest& request);
  HttpResponse Page(const HttpRequest& request);

  HttpResponse Options(const std::string& methods) const;
  Status CheckServing() const;
  void Run(const Route& route, HttpRequest request, const std::shared_ptr<HttpExchange>& exchange);
  void Generate(const HttpRequest& request, const std::shared_ptr<HttpExchange>& exchange);
  nlohmann::json ModelJson(const std::string& name) const;

  const ApiRoutesOptions options_;
  const ApiKeys keys_;
  const int64_t started_;  // seconds since the epoch
  std::atomic<GenerationService*> service_{nullptr};
  std::atomic<const MetricsRegistry*> metrics_{nullptr};
  std::atomic<bool> draining_{false};
  boost::asio::thread_pool workers_{1};  // tokenises long prompts beside the I/O threads
};

}  // namespace gloam
