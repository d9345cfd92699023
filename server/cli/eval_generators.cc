#include "server/cli/eval_generators.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <utility>

#include "server/blocking_generation.h"
#include "server/cli/local_model.h"
#include "server/http/client.h"
#include "server/version.h"

namespace gloam {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// ---- In this process --------------------------------------------------------------------------

class LocalTokenizer final : public PromptTokenizer {
 public:
  explicit LocalTokenizer(const GenerationService& service) : service_(service) {}

  StatusOr<std::vector<int32_t>> Encode(const std::string& text, bool add_special) override {
    return service_.Tokenize({.input = text, .add_special_tokens = add_special});
  }
  StatusOr<std::vector<int32_t>> EncodeChat(const std::string& message) override {
    TokenizeRequest request;
    request.input = std::vector<ChatMessage>{{.role = "user", .content = message}};
    return service_.Tokenize(request);
  }
  StatusOr<std::string> Decode(std::span<const int32_t> tokens) override {
    return service_.Detokenize({.tokens = {tokens.begin(), tokens.end()}});
  }

 private:
  const GenerationService& service_;
};

class LocalGenerator final : public TextGenerator {
 public:
  LocalGenerator(std::unique_ptr<LocalModel> model, const ServeOptions& options)
      : model_(std::move(model)),
        tokenizer_(model_->service()),
        settings_(
            {{"activations", options.activations}, {"kv_cache_dtype", options.kv_cache_dtype}}) {}

  PromptTokenizer& tokenizer() override { return tokenizer_; }
  std::string model_name() const override { return model_->service().model_name(); }
  int max_model_len() const override { return model_->engine().max_model_len(); }
  json settings() const override { return settings_; }

  StatusOr<GeneratedText> Generate(const GenerateRequest& request) override {
    CompletionRequest completion;
    completion.prompts.emplace_back(
        std::vector<int64_t>(request.prompt.begin(), request.prompt.end()));
    GenerationParams& params = completion.params;
    params.temperature = 0;
    params.max_tokens = request.max_tokens;
    params.min_tokens = request.min_tokens;
    params.stop_token_ids.assign(request.stop_token_ids.begin(), request.stop_token_ids.end());
    params.num_decoded_prompt_tokens = request.num_decoded_prompt_tokens;
    if (!request.policy.is_null()) {
      params.sparsity.body = nlohmann::ordered_json(request.policy);
    } else {
      params.sparsity.policy = std::string(kDensePolicy);
    }
    GLOAM_ASSIGN_OR_RETURN(auto prepared, model_->service().Prepare(completion));
    GeneratedText text;
    GLOAM_ASSIGN_OR_RETURN(
        const RequestSummary summary,
        RunBlocking(model_->engine(), std::move(prepared), [&](const auto& delta) {
          text.text += delta.text;
          return true;
        }));
    text.num_tokens = summary.completion_tokens;
    text.sparsity = summary.sparsity;
    return text;
  }

 private:
  const std::unique_ptr<LocalModel> model_;
  LocalTokenizer tokenizer_;
  const json settings_;
};

// A folder of policy files, as --sparsity-dir takes it, for as long as a model loads.
class PolicyFolder {
 public:
  static StatusOr<std::unique_ptr<PolicyFolder>> Make(const std::vector<EvalPolicy>& policies) {
    std::error_code error;
    std::string path = (fs::temp_directory_path(error) / "gloam-eval-XXXXXX").string();
    if (error || mkdtemp(path.data()) == nullptr) {
      return Unavailable("cannot make a folder for temporary files");
    }
    std::unique_ptr<PolicyFolder> folder(new PolicyFolder(path));
    for (const EvalPolicy& policy : policies) {
      if (policy.dense()) continue;
      folder->Add(policy.name, policy.body);
      // The budget comes later; what it reads is the same whatever the budget is.
      if (policy.prunes_by_mass()) {
        folder->Add("control-of-" + policy.name, MatchedControl(policy, kBlockTokens).body);
      }
    }
    return folder;
  }
  ~PolicyFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  const std::string& names() const { return names_; }  // with commas between

 private:
  explicit PolicyFolder(std::string path) : path_(std::move(path)) {}

  void Add(const std::string& name, const json& body) {
    std::ofstream(fs::path(path_) / (name + ".json")) << body.dump();
    names_ += names_.empty() ? name : "," + name;
  }

  const std::string path_;
  std::string names_;
};

// ---- Over HTTP --------------------------------------------------------------------------------

// Connections to one server, each used by one thread at a time.
class HttpConnections {
 public:
  HttpConnections(std::string url, std::string api_key)
      : url_(std::move(url)), api_key_(std::move(api_key)) {}

  // A JSON object; `body` null: GET.
  StatusOr<json> Ask(const std::string& path, const json& body) {
    GLOAM_ASSIGN_OR_RETURN(std::unique_ptr<HttpClient> client, Take());
    auto answer = body.is_null() ? client->Get(path) : client->Post(path, body.dump());
    if (!answer.ok()) return answer.status();  // the connection may be broken: let it go
    {
      std::lock_guard lock(mutex_);
      idle_.push_back(std::move(client));
    }
    json parsed = json::parse(*answer, nullptr, /*allow_exceptions=*/false);
    if (!parsed.is_object()) return Unavailable("{}{} did not answer with JSON", url_, path);
    return parsed;
  }

 private:
  StatusOr<std::unique_ptr<HttpClient>> Take() {
    {
      std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        auto client = std::move(idle_.back());
        idle_.pop_back();
        return client;
      }
    }
    return HttpClient::Connect(url_, api_key_);
  }

  const std::string url_;
  const std::string api_key_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<HttpClient>> idle_;
};

// `read(json)`, with what the server's answer lacks as an error.
template <typename Read>
auto ReadAnswer(const json& answer, Read read) -> StatusOr<decltype(read(answer))> {
  try {
    return read(answer);
  } catch (const json::exception& error) {
    return Unavailable("the server's answer is not understood: {}", error.what());
  }
}

class HttpTokenizer final : public PromptTokenizer {
 public:
  explicit HttpTokenizer(HttpConnections& server) : server_(server) {}

  StatusOr<std::vector<int32_t>> Encode(const std::string& text, bool add_special) override {
    return Tokens({{"prompt", text}, {"add_special_tokens", add_special}});
  }
  StatusOr<std::vector<int32_t>> EncodeChat(const std::string& message) override {
    return Tokens({{"messages", {{{"role", "user"}, {"content", message}}}}});
  }
  StatusOr<std::string> Decode(std::span<const int32_t> tokens) override {
    const json request = {{"tokens", std::vector<int32_t>(tokens.begin(), tokens.end())}};
    GLOAM_ASSIGN_OR_RETURN(const json answer, server_.Ask("/detokenize", request));
    return ReadAnswer(answer,
                      [](const json& body) { return body.at("prompt").get<std::string>(); });
  }

 private:
  StatusOr<std::vector<int32_t>> Tokens(const json& request) {
    GLOAM_ASSIGN_OR_RETURN(const json answer, server_.Ask("/tokenize", request));
    return ReadAnswer(
        answer, [](const json& body) { return body.at("tokens").get<std::vector<int32_t>>(); });
  }

  HttpConnections& server_;
};

std::optional<SparsityUsage> ReadSparsity(const json& usage) {
  const auto found = usage.find("sparsity");
  if (found == usage.end() || !found->is_object()) return std::nullopt;
  SparsityUsage sparsity;
  sparsity.kept_tokens_per_head = found->at("mean_kept_tokens_per_head");
  sparsity.loaded_tokens_per_kv_head = found->at("mean_loaded_tokens_per_kv_head");
  sparsity.loaded_share = found->at("mean_loaded_share");
  sparsity.sparse_steps = found->at("sparse_steps");
  sparsity.bypassed_steps = found->at("bypassed_steps");
  if (found->at("true_mass").is_number()) sparsity.true_mass = found->at("true_mass").get<double>();
  return sparsity;
}

class HttpGenerator final : public TextGenerator {
 public:
  HttpGenerator(const std::string& url, const std::string& api_key)
      : server_(url, api_key), tokenizer_(server_) {}

  Status Connect() {
    GLOAM_ASSIGN_OR_RETURN(const json models, server_.Ask("/v1/models", nullptr));
    const auto read = ReadAnswer(models, [this](const json& body) {
      const json& model = body.at("data").at(0);
      model_name_ = model.at("id").get<std::string>();
      max_model_len_ = model.at("max_model_len").get<int>();
      return true;
    });
    return read.status();
  }

  PromptTokenizer& tokenizer() override { return tokenizer_; }
  std::string model_name() const override { return model_name_; }
  int max_model_len() const override { return max_model_len_; }
  json settings() const override { return {{"over", "http"}}; }

  StatusOr<GeneratedText> Generate(const GenerateRequest& request) override {
    json body = {{"model", model_name_},
                 {"prompt", request.prompt},
                 {"temperature", 0},
                 {"max_tokens", request.max_tokens},
                 {"min_tokens", request.min_tokens},
                 {"stop_token_ids", request.stop_token_ids},
                 {"sparsity", request.policy.is_null() ? json(kDenseRow) : request.policy},
                 {"sparsity_decode_prompt_tokens", request.num_decoded_prompt_tokens}};
    GLOAM_ASSIGN_OR_RETURN(const json answer, server_.Ask("/v1/completions", body));
    return ReadAnswer(answer, [&](const json& completion) {
      const json& usage = completion.at("usage");
      GeneratedText text;
      text.text = completion.at("choices").at(0).at("text").get<std::string>();
      text.num_tokens = usage.at("completion_tokens").get<int>();
      if (!request.policy.is_null()) text.sparsity = ReadSparsity(usage);
      return text;
    });
  }

 private:
  HttpConnections server_;
  HttpTokenizer tokenizer_;
  std::string model_name_;
  int max_model_len_ = 0;
};

}  // namespace

StatusOr<std::unique_ptr<TextGenerator>> MakeLocalGenerator(
    ServeOptions options, const std::vector<EvalPolicy>& policies) {
  GLOAM_ASSIGN_OR_RETURN(const auto folder, PolicyFolder::Make(policies));
  options.sparsity = std::string(kDensePolicy);
  options.sparsity_dir = folder->path();
  options.sparsity_policies = folder->names().empty() ? options.sparsity : folder->names();
  // Policies are served on the CPU only so far.
  if (options.device == "auto" && !folder->names().empty()) options.device = "cpu";
  GLOAM_ASSIGN_OR_RETURN(auto model, LocalModel::Load(options));
  return std::make_unique<LocalGenerator>(std::move(model), options);
}

StatusOr<std::unique_ptr<TextGenerator>> MakeHttpGenerator(const std::string& url,
                                                           const std::string& api_key) {
  auto generator = std::make_unique<HttpGenerator>(url, api_key);
  GLOAM_RETURN_IF_ERROR(generator->Connect());
  return generator;
}

StatusOr<KnownPolicies> FetchPolicies(const std::string& url, const std::string& api_key) {
  HttpConnections server(url, api_key);
  GLOAM_ASSIGN_OR_RETURN(const json answer, server.Ask("/v1/sparsity/policies", nullptr));
  return ReadAnswer(answer, [](const json& body) {
    KnownPolicies known;
    for (const json& policy : body.at("data")) {
      if (policy.at("usable") == true) known[policy.at("name")] = policy.at("policy");
    }
    known[std::string(kDenseRow)] = nullptr;
    return known;
  });
}

}  // namespace gloam
