#include "server/http/routes.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <utility>

#include "base/logging.h"
#include "boost/asio/dispatch.hpp"
#include "boost/asio/post.hpp"
#include "server/api_error.h"
#include "server/http/generation.h"
#include "server/http/web_files.h"
#include "server/openai/requests.h"
#include "server/strict_json.h"
#include "server/version.h"

namespace gloam {

using nlohmann::json;

namespace {

// Bodies larger than this are parsed and tokenised off the I/O threads (about 1 ms of work).
constexpr size_t kInlineBodyBytes = 16 << 10;

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

HttpResponse JsonResponse(const json& body) {
  HttpResponse response;
  response.body = DumpJson(body);
  return response;
}

// "application/json; charset=utf-8" is fine.
bool IsJson(std::string_view content_type) {
  std::string type(content_type.substr(0, content_type.find(';')));
  while (!type.empty() && (type.back() == ' ' || type.back() == '\t')) type.pop_back();
  std::transform(type.begin(), type.end(), type.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return type == "application/json";
}

bool Matches(std::string_view pattern, std::string_view path) {
  if (pattern.size() > 2 && pattern.substr(pattern.size() - 2) == "/*") {
    const std::string_view prefix = pattern.substr(0, pattern.size() - 1);
    return path.size() > prefix.size() && path.substr(0, prefix.size()) == prefix;
  }
  return path == pattern;
}

std::string Fingerprint(const std::string& model) {
  return fmt::format("fp_{:010x}", std::hash<std::string>()(model + kVersion) & 0xff'ffff'ffffULL);
}

// The model's and the prompt's part of a generation request, whichever kind it is.
StatusOr<PreparedGeneration> PrepareBody(const GenerationService& service, bool is_chat,
                                         std::string_view body, std::vector<std::string>* stop) {
  if (is_chat) {
    GLOAM_ASSIGN_OR_RETURN(ChatCompletionRequest request, ParseChatCompletionRequest(body));
    *stop = request.params.stop;
    return service.Prepare(request);
  }
  GLOAM_ASSIGN_OR_RETURN(CompletionRequest request, ParseCompletionRequest(body));
  *stop = request.params.stop;
  return service.Prepare(request);
}

}  // namespace

ApiRoutes::ApiRoutes(ApiRoutesOptions options)
    : options_(std::move(options)), keys_(options_.api_keys), started_(UnixSeconds()) {}

void ApiRoutes::SetService(GenerationService* service, const MetricsRegistry* metrics) {
  metrics_ = metrics;
  service_ = service;
}

const std::vector<ApiRoutes::Route>& ApiRoutes::Routes() {
  static const std::vector<Route> routes = {
      {"POST", "/v1/chat/completions", Access::kKey, nullptr},
      {"POST", "/v1/completions", Access::kKey, nullptr},
      {"GET", "/v1/models", Access::kKey, &ApiRoutes::ListModels},
      {"GET", "/v1/models/*", Access::kKey, &ApiRoutes::GetModel},
      {"POST", "/tokenize", Access::kKey, &ApiRoutes::Tokenize},
      {"POST", "/detokenize", Access::kKey, &ApiRoutes::Detokenize},
      {"GET", "/v1/sparsity/policies", Access::kKey, &ApiRoutes::SparsityPolicies},
      {"GET", "/version", Access::kKey, &ApiRoutes::Version},
      {"GET", "/metrics", Access::kKey, &ApiRoutes::Metrics},
      {"GET", "/openapi.json", Access::kKey, &ApiRoutes::OpenApi},
      {"GET", "/docs", Access::kKey, &ApiRoutes::Page},
      {"GET", "/", Access::kKey, &ApiRoutes::Page},
      {"GET", "/health", Access::kOpen, &ApiRoutes::Ready},
      {"GET", "/ready", Access::kOpen, &ApiRoutes::Ready},
      {"GET", "/live", Access::kOpen, &ApiRoutes::Live},
  };
  return routes;
}

void ApiRoutes::Handle(HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
  const auto& routes = Routes();
  const auto route = std::find_if(routes.begin(), routes.end(),
                                  [&](const Route& r) { return Matches(r.path, request.path); });
  const bool is_options = request.method == "OPTIONS";
  const bool is_preflight = is_options && !options_.allowed_origin.empty();
  const bool is_open = is_preflight || (route != routes.end() && route->access == Access::kOpen);
  if (!is_open && !keys_.Allow(request.authorization)) {
    return exchange->Respond(ErrorResponse(
        WithErrorCode(MakeStatus(StatusCode::kUnauthenticated,
                                 "Incorrect or missing API key: send it in the header "
                                 "'Authorization: Bearer KEY'"),
                      kInvalidApiKeyCode)));
  }
  if (route == routes.end()) {
    return exchange->Respond(
        ErrorResponse(NotFound("There is no such route; see /openapi.json for those that exist")));
  }
  const bool is_get = std::string_view(route->method) == "GET";
  const std::string methods = is_get ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
  if (is_options) return exchange->Respond(Options(methods));
  if (request.method != route->method && !(is_get && request.method == "HEAD")) {
    HttpResponse response =
        ErrorResponse(InvalidArgument("This route answers only the methods {}", methods));
    response.status = 405;
    response.headers.emplace_back("Allow", methods);
    return exchange->Respond(std::move(response));
  }
  if (!is_get && !IsJson(request.content_type)) {
    HttpResponse response =
        ErrorResponse(InvalidArgument("The Content-Type must be application/json"));
    response.status = 415;
    return exchange->Respond(std::move(response));
  }
  if (request.body.size() <= kInlineBodyBytes) return Run(*route, std::move(request), exchange);
  boost::asio::post(workers_, [this, route = &*route, request = std::move(request),
                               exchange]() mutable { Run(*route, std::move(request), exchange); });
}

// On the exchange's executor or on a worker: answers by posting.
void ApiRoutes::Run(const Route& route, HttpRequest request,
                    const std::shared_ptr<HttpExchange>& exchange) {
  try {
    if (route.answer == nullptr) return Generate(request, exchange);
    HttpResponse response = (this->*route.answer)(request);
    boost::asio::dispatch(exchange->executor(),
                          [exchange, response = std::move(response)]() mutable {
                            exchange->Respond(std::move(response));
                          });
  } catch (const std::exception& error) {  // of a library: the process lives, the request does not
    SPDLOG_ERROR("{} {}: {}", request.id, route.path, EscapeForLog(error.what()));
    boost::asio::dispatch(exchange->executor(), [exchange] {
      exchange->Respond(ErrorResponse(Internal("The server failed to handle this request")));
    });
  }
}

void ApiRoutes::Generate(const HttpRequest& request,
                         const std::shared_ptr<HttpExchange>& exchange) {
  ResponseInfo info;
  info.is_chat = request.path == "/v1/chat/completions";
  const auto prepare = [&]() -> StatusOr<PreparedGeneration> {
    GLOAM_RETURN_IF_ERROR(CheckServing());
    return PrepareBody(*service_.load(), info.is_chat, request.body, &info.stop);
  };
  auto prepared = prepare();
  if (!prepared.ok()) {
    const Status& status = prepared.status();
    SPDLOG_DEBUG("{} refused: {}", EscapeForLog(request.id), EscapeForLog(MessageOf(status)));
    boost::asio::dispatch(exchange->executor(),
                          [exchange, response = ErrorResponse(status)]() mutable {
                            exchange->Respond(std::move(response));
                          });
    return;
  }
  GenerationService& service = *service_.load();
  info.id = prepared->id;
  info.created = UnixSeconds();
  info.model = service.model_name();
  info.system_fingerprint = Fingerprint(info.model);
  if (options_.request_timeout_ms > 0) {
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.request_timeout_ms);
    for (Request& engine_request : prepared->requests) engine_request.deadline = deadline;
  }
  boost::asio::dispatch(exchange->executor(), [this, &service, exchange, info = std::move(info),
                                               prepared = *std::move(prepared)]() mutable {
    HttpGeneration::Start(service, std::move(prepared), std::move(info), options_.max_queued_bytes,
                          exchange);
  });
}

Status ApiRoutes::CheckServing() const {
  if (draining_) return Unavailable("The server is shutting down");
  GenerationService* service = service_.load();
  if (service == nullptr) return Unavailable("The model is still loading");
  if (service->engine().failed()) return Unavailable("The engine has failed");
  return OkStatus();
}

HttpResponse ApiRoutes::Options(const std::string& methods) const {
  HttpResponse response;
  response.status = 204;
  response.headers.emplace_back("Allow", methods);
  if (!options_.allowed_origin.empty()) {
    response.headers.emplace_back("Access-Control-Allow-Methods", methods);
    response.headers.emplace_back("Access-Control-Allow-Headers", "*, Authorization");
    response.headers.emplace_back("Access-Control-Max-Age", "600");
  }
  return response;
}

HttpResponse ApiRoutes::Ready(const HttpRequest&) {
  const Status status = CheckServing();
  return status.ok() ? JsonResponse({{"status", "ok"}}) : ErrorResponse(status);
}

HttpResponse ApiRoutes::Live(const HttpRequest&) {
  GenerationService* service = service_.load();
  if (service != nullptr && service->engine().failed()) {
    return ErrorResponse(Unavailable("The engine has failed"));
  }
  return JsonResponse({{"status", "ok"}});
}

HttpResponse ApiRoutes::Version(const HttpRequest&) {
  return JsonResponse({{"version", kVersion}});
}

HttpResponse ApiRoutes::Metrics(const HttpRequest&) {
  const MetricsRegistry* metrics = metrics_.load();
  if (metrics == nullptr) return ErrorResponse(Unavailable("The model is still loading"));
  HttpResponse response;
  response.content_type = "text/plain; version=0.0.4; charset=utf-8";
  response.body = metrics->Serialize();
  return response;
}

json ApiRoutes::ModelJson(const std::string& name) const {
  const GenerationService& service = *service_.load();
  return {{"id", name},
          {"object", "model"},
          {"created", started_},
          {"owned_by", "gloam"},
          {"root", service.model_name()},
          {"parent", nullptr},
          {"max_model_len", service.engine().max_model_len()}};
}

HttpResponse ApiRoutes::ListModels(const HttpRequest&) {
  const GenerationService* service = service_.load();
  if (service == nullptr) return ErrorResponse(Unavailable("The model is still loading"));
  json models = json::array();
  for (const std::string& name : service->model_names()) models.push_back(ModelJson(name));
  return JsonResponse({{"object", "list"}, {"data", std::move(models)}});
}

HttpResponse ApiRoutes::GetModel(const HttpRequest& request) {
  const GenerationService* service = service_.load();
  if (service == nullptr) return ErrorResponse(Unavailable("The model is still loading"));
  const std::string name = request.path.substr(std::string_view("/v1/models/").size());
  const Status status = service->CheckModel(name);
  return status.ok() ? JsonResponse(ModelJson(name)) : ErrorResponse(status);
}

HttpResponse ApiRoutes::Tokenize(const HttpRequest& request) {
  const auto tokenize = [&]() -> StatusOr<std::vector<int32_t>> {
    GLOAM_RETURN_IF_ERROR(CheckServing());
    GLOAM_ASSIGN_OR_RETURN(const TokenizeRequest parsed, ParseTokenizeRequest(request.body));
    return service_.load()->Tokenize(parsed);
  };
  const auto tokens = tokenize();
  if (!tokens.ok()) return ErrorResponse(tokens.status());
  return JsonResponse({{"count", tokens->size()},
                       {"max_model_len", service_.load()->engine().max_model_len()},
                       {"tokens", *tokens},
                       {"token_strs", nullptr}});
}

HttpResponse ApiRoutes::Detokenize(const HttpRequest& request) {
  const auto detokenize = [&]() -> StatusOr<std::string> {
    GLOAM_RETURN_IF_ERROR(CheckServing());
    GLOAM_ASSIGN_OR_RETURN(const DetokenizeRequest parsed, ParseDetokenizeRequest(request.body));
    return service_.load()->Detokenize(parsed);
  };
  const auto text = detokenize();
  if (!text.ok()) return ErrorResponse(text.status());
  return JsonResponse({{"prompt", *text}});
}

HttpResponse ApiRoutes::SparsityPolicies(const HttpRequest&) {
  const GenerationService* service = service_.load();
  if (service == nullptr) return ErrorResponse(Unavailable("The model is still loading"));
  const PolicyRegistry& registry = service->policies();
  json policies = json::array();
  for (const NamedPolicy& policy : registry.policies()) {
    policies.push_back(
        {{"name", policy.name},
         {"policy", policy.body},
         {"is_default", policy.name == registry.default_name()},
         {"usable", policy.usable()},
         {"reason", policy.usable() ? json(nullptr) : json(MessageOf(policy.unusable))}});
  }
  return JsonResponse(
      {{"object", "list"}, {"default", registry.default_name()}, {"data", std::move(policies)}});
}

HttpResponse ApiRoutes::OpenApi(const HttpRequest&) {
  HttpResponse response;
  response.body = kOpenApiJson;
  return response;
}

HttpResponse ApiRoutes::Page(const HttpRequest&) {
  HttpResponse response;
  response.content_type = "text/html; charset=utf-8";
  response.body = kIndexHtml;
  response.headers.emplace_back("Content-Security-Policy",
                                "default-src 'none'; style-src 'unsafe-inline'; script-src "
                                "'unsafe-inline'; connect-src 'self'");
  return response;
}

}  // namespace gloam
