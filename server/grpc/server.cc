#include "server/grpc/server.h"

#include <atomic>
#include <random>
#include <string_view>
#include <utility>

#include "base/logging.h"
#include "gloam/v1/chat_completions.grpc.pb.h"
#include "gloam/v1/completions.grpc.pb.h"
#include "gloam/v1/models.grpc.pb.h"
#include "gloam/v1/sparsity.grpc.pb.h"
#include "gloam/v1/tokenizer.grpc.pb.h"
#include "google/protobuf/stubs/logging.h"
#include "grpc/support/log.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "models/tokenizer/utf8.h"
#include "server/api_error.h"
#include "server/api_keys.h"
#include "server/grpc/call.h"
#include "server/grpc/codec.h"
#include "server/strict_json.h"

namespace gloam {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;

constexpr int kMaxMetadataBytes = 64 << 10;
constexpr int kMaxStreamsPerConnection = 1024;
// A connection whose client answers no ping for a while is closed, and its calls are cancelled.
constexpr int kKeepaliveTimeMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
// Clients may ping as often as this; more is closed with too_many_pings.
constexpr int kMinPingIntervalMs = 10'000;
constexpr size_t kMaxRequestIdBytes = 128;

// The handlers are given bytes: a request that does not parse is then answered INVALID_ARGUMENT
// (gRPC's own answer is UNIMPLEMENTED), and one call class serves all generation methods.
using CompletionsBase = v1::Completions::WithRawCallbackMethod_Create<
    v1::Completions::WithRawCallbackMethod_CreateStream<v1::Completions::Service>>;
using ChatCompletionsBase = v1::ChatCompletions::WithRawCallbackMethod_Create<
    v1::ChatCompletions::WithRawCallbackMethod_CreateStream<v1::ChatCompletions::Service>>;
using ModelsBase = v1::Models::WithRawCallbackMethod_List<
    v1::Models::WithRawCallbackMethod_Get<v1::Models::Service>>;
using TokenizerBase = v1::Tokenizer::WithRawCallbackMethod_Tokenize<
    v1::Tokenizer::WithRawCallbackMethod_Detokenize<v1::Tokenizer::Service>>;
using SparsityBase = v1::Sparsity::WithRawCallbackMethod_ListPolicies<v1::Sparsity::Service>;

std::string_view MetadataOf(const CallbackServerContext& context, const char* key) {
  const auto found = context.client_metadata().find(key);
  if (found == context.client_metadata().end()) return {};
  return {found->second.data(), found->second.size()};
}

bool IsSaneRequestId(std::string_view id) {
  if (id.empty() || id.size() > kMaxRequestIdBytes) return false;
  for (const char c : id) {
    const bool is_letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const bool is_other = (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == ':';
    if (!is_letter && !is_other) return false;
  }
  return true;
}

std::string NewRequestId() {
  static const uint32_t start = std::random_device()();
  static std::atomic<uint32_t> counter = 0;
  return fmt::format("req-{:08x}{:08x}", start, counter.fetch_add(1));
}

// What the services share.
struct Front {
  const GrpcServerOptions options;
  GenerationService& service;
  const ApiKeys keys;
  const int64_t started_at;  // Unix time in seconds
  std::atomic<bool> serving = false;
  GrpcCallLoop loop;

  // Every handler's first step: the request's id, then the key.
  [[nodiscard]] Status Admit(CallbackServerContext* context) const {
    const std::string_view id = MetadataOf(*context, "x-request-id");
    context->AddInitialMetadata("x-request-id",
                                IsSaneRequestId(id) ? std::string(id) : NewRequestId());
    if (keys.Allow(MetadataOf(*context, "authorization"))) return OkStatus();
    return WithErrorCode(
        MakeStatus(StatusCode::kUnauthenticated,
                   "missing or wrong API key: send it as `authorization: Bearer KEY` metadata"),
        kInvalidApiKeyCode);
  }

  template <typename Message>
  [[nodiscard]] StatusOr<PreparedGeneration> PrepareGeneration(CallbackServerContext* context,
                                                               const ByteBuffer* bytes,
                                                               bool stream) {
    GLOAM_RETURN_IF_ERROR(Admit(context));
    if (!serving) return Unavailable("the server is loading its model or stopping");
    Message message;
    GLOAM_RETURN_IF_ERROR(ParseMessage(*bytes, &message));
    if (!stream && message.has_stream_options()) {
      return InvalidField("stream_options", "stream_options is for CreateStream only");
    }
    GLOAM_ASSIGN_OR_RETURN(auto request, ToApi(message));
    request.stream.stream = stream;
    return service.Prepare(request);
  }

  GrpcCallStart StartOf(CallbackServerContext* context, StatusOr<PreparedGeneration> prepared,
                        GrpcCallStart::MakeEncoder make_encoder) {
    return {loop,
            *context,
            service,
            std::move(prepared),
            make_encoder,
            options.max_queued_bytes,
            options.request_timeout};
  }

  // Handles a call that needs no engine: `answer(request, &response)` returns a Status.
  template <typename RequestMessage, typename ResponseMessage, typename Answer>
  grpc::ServerUnaryReactor* Respond(CallbackServerContext* context, const ByteBuffer* bytes,
                                    ByteBuffer* response, Answer answer) const {
    const auto run = [&]() -> Status {
      GLOAM_RETURN_IF_ERROR(Admit(context));
      RequestMessage request_message;
      GLOAM_RETURN_IF_ERROR(ParseMessage(*bytes, &request_message));
      ResponseMessage response_message;
      GLOAM_RETURN_IF_ERROR(answer(request_message, &response_message));
      *response = SerializeMessage(response_message);
      return OkStatus();
    };
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(run(), context));
    return reactor;
  }
};

// A service that generates, in one message or as a stream of them.
template <typename Base, typename Request, GrpcCallStart::MakeEncoder kMakeEncoder>
class GeneratingService final : public Base {
 public:
  explicit GeneratingService(Front& front) : front_(front) {}

  grpc::ServerUnaryReactor* Create(CallbackServerContext* context, const ByteBuffer* request,
                                   ByteBuffer* response) override {
    return StartUnaryCall(Start(context, request, /*stream=*/false), response);
  }

  grpc::ServerWriteReactor<ByteBuffer>* CreateStream(CallbackServerContext* context,
                                                     const ByteBuffer* request) override {
    return StartStreamCall(Start(context, request, /*stream=*/true));
  }

 private:
  GrpcCallStart Start(CallbackServerContext* context, const ByteBuffer* request, bool stream) {
    return front_.StartOf(context, front_.PrepareGeneration<Request>(context, request, stream),
                          kMakeEncoder);
  }

  Front& front_;
};

using CompletionsService =
    GeneratingService<CompletionsBase, v1::CreateCompletionRequest, MakeCompletionEncoder>;
using ChatCompletionsService =
    GeneratingService<ChatCompletionsBase, v1::CreateChatCompletionRequest, MakeChatEncoder>;

class ModelsService final : public ModelsBase {
 public:
  explicit ModelsService(Front& front) : front_(front) {}

  grpc::ServerUnaryReactor* List(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return front_.Respond<v1::ListModelsRequest, v1::ListModelsResponse>(
        context, request, response, [&](const auto&, v1::ListModelsResponse* answer) {
          for (const std::string& name : front_.service.model_names()) {
            Describe(name, answer->add_models());
          }
          return OkStatus();
        });
  }

  grpc::ServerUnaryReactor* Get(CallbackServerContext* context, const ByteBuffer* request,
                                ByteBuffer* response) override {
    return front_.Respond<v1::GetModelRequest, v1::Model>(
        context, request, response,
        [&](const v1::GetModelRequest& query, v1::Model* answer) -> Status {
          if (query.model().empty()) return InvalidField("model", "model is required");
          GLOAM_RETURN_IF_ERROR(front_.service.CheckModel(query.model()));
          Describe(query.model(), answer);
          return OkStatus();
        });
  }

 private:
  void Describe(const std::string& name, v1::Model* model) const {
    model->set_id(name);
    model->set_created(front_.started_at);
    model->set_owned_by("gloam");
    model->set_max_model_len(front_.service.engine().max_model_len());
  }

  Front& front_;
};

class TokenizerService final : public TokenizerBase {
 public:
  explicit TokenizerService(Front& front) : front_(front) {}

  grpc::ServerUnaryReactor* Tokenize(CallbackServerContext* context, const ByteBuffer* request,
                                     ByteBuffer* response) override {
    return front_.Respond<v1::TokenizeRequest, v1::TokenizeResponse>(
        context, request, response,
        [&](const v1::TokenizeRequest& query, v1::TokenizeResponse* answer) -> Status {
          GLOAM_ASSIGN_OR_RETURN(const auto api_request, ToApi(query));
          GLOAM_ASSIGN_OR_RETURN(const auto tokens, front_.service.Tokenize(api_request));
          answer->mutable_tokens()->Add(tokens.begin(), tokens.end());
          answer->set_count(static_cast<int>(tokens.size()));
          answer->set_max_model_len(front_.service.engine().max_model_len());
          return OkStatus();
        });
  }

  grpc::ServerUnaryReactor* Detokenize(CallbackServerContext* context, const ByteBuffer* request,
                                       ByteBuffer* response) override {
    return front_.Respond<v1::DetokenizeRequest, v1::DetokenizeResponse>(
        context, request, response,
        [&](const v1::DetokenizeRequest& query, v1::DetokenizeResponse* answer) -> Status {
          GLOAM_ASSIGN_OR_RETURN(const auto api_request, ToApi(query));
          GLOAM_ASSIGN_OR_RETURN(const auto text, front_.service.Detokenize(api_request));
          answer->set_prompt(ReplaceInvalidUtf8(text));
          return OkStatus();
        });
  }

 private:
  Front& front_;
};

class SparsityService final : public SparsityBase {
 public:
  explicit SparsityService(Front& front) : front_(front) {}

  grpc::ServerUnaryReactor* ListPolicies(CallbackServerContext* context, const ByteBuffer* request,
                                         ByteBuffer* response) override {
    return front_.Respond<v1::ListPoliciesRequest, v1::ListPoliciesResponse>(
        context, request, response, [&](const auto&, v1::ListPoliciesResponse* answer) {
          const PolicyRegistry& registry = front_.service.policies();
          for (const NamedPolicy& policy : registry.policies()) {
            v1::Policy* message = answer->add_policies();
            message->set_name(policy.name);
            message->set_is_default(policy.name == registry.default_name());
            message->set_policy_json(DumpJson(policy.body));
            message->set_usable(policy.usable());
            if (!policy.usable()) message->set_reason(MessageOf(policy.unusable));
          }
          return OkStatus();
        });
  }

 private:
  Front& front_;
};

// gRPC's own messages (a connection that broke, an address in use) go where ours go.
void LogForGrpc(gpr_log_func_args* line) {
  if (line->severity == GPR_LOG_SEVERITY_ERROR) {
    SPDLOG_WARN("gRPC: {}", EscapeForLog(line->message));
  } else {
    SPDLOG_DEBUG("gRPC: {}", EscapeForLog(line->message));
  }
}

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// "host:port" as gRPC reads it; an IPv6 address gets its brackets.
std::string Address(const std::string& host, int port) {
  const bool is_ipv6 = host.find(':') != std::string::npos && host.front() != '[';
  return is_ipv6 ? fmt::format("[{}]:{}", host, port) : fmt::format("{}:{}", host, port);
}

}  // namespace

struct GrpcServer::Impl {
  Impl(const GrpcServerOptions& options, GenerationService& service)
      : front{options,       service, ApiKeys(options.api_keys),
              UnixSeconds(), false,   GrpcCallLoop(options.write_timeout)} {}

  Front front;
  CompletionsService completions{front};
  ChatCompletionsService chat_completions{front};
  ModelsService models{front};
  TokenizerService tokenizer{front};
  SparsityService sparsity{front};
  std::unique_ptr<grpc::Server> server;
  int port = 0;
};

GrpcServer::GrpcServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

GrpcServer::~GrpcServer() { Shutdown(std::chrono::system_clock::now()); }

StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(const GrpcServerOptions& options,
                                                        GenerationService& service) {
  if (options.host.empty()) return InvalidArgument("host may not be empty");
  if (options.port < 0 || options.port > 65535) {
    return InvalidArgument("grpc-port must be between 0 and 65535, got {}", options.port);
  }
  gpr_set_log_function(LogForGrpc);
  // Protobuf prints to stderr about every malformed request; the client is told instead.
  google::protobuf::SetLogHandler(nullptr);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  auto impl = std::make_unique<Impl>(options, service);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(Address(options.host, options.port), grpc::InsecureServerCredentials(),
                           &impl->port);
  builder.RegisterService(&impl->completions);
  builder.RegisterService(&impl->chat_completions);
  builder.RegisterService(&impl->models);
  builder.RegisterService(&impl->tokenizer);
  builder.RegisterService(&impl->sparsity);
  builder.SetMaxReceiveMessageSize(options.max_message_bytes);
  builder.SetMaxSendMessageSize(-1);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr || impl->port == 0) {
    return Unavailable("cannot listen on {} for gRPC (--host, --grpc-port)",
                       Address(options.host, options.port));
  }
  grpc::HealthCheckServiceInterface* health = impl->server->GetHealthCheckService();
  for (const char* name :
       {v1::Completions::service_full_name(), v1::ChatCompletions::service_full_name(),
        v1::Models::service_full_name(), v1::Tokenizer::service_full_name(),
        v1::Sparsity::service_full_name()}) {
    health->SetServingStatus(name, false);
  }
  std::unique_ptr<GrpcServer> server(new GrpcServer(std::move(impl)));
  server->SetServing(false);
  return server;
}

void GrpcServer::SetServing(bool serving) {
  impl_->front.serving = serving;
  impl_->server->GetHealthCheckService()->SetServingStatus(serving);  // of every service it knows
}

void GrpcServer::Shutdown(std::chrono::system_clock::time_point deadline) {
  if (impl_->server == nullptr) return;
  SetServing(false);
  impl_->front.loop.WaitUntilIdle(deadline);
  // Health watches never end by themselves, so what is left now is cancelled.
  impl_->server->Shutdown(std::chrono::system_clock::now());
  impl_->server->Wait();
  impl_->server.reset();
}

int GrpcServer::port() const { return impl_->port; }

}  // namespace gloam
