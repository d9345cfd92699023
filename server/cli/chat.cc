// `gloam chat MODEL|URL` and `gloam complete MODEL PROMPT`.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <memory>
#include <utility>

#include "nlohmann/json.hpp"
#include "server/blocking_generation.h"
#include "server/cli/cli.h"
#include "server/cli/local_model.h"
#include "server/http/client.h"

namespace gloam {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

// Ctrl-C ends the answer that is being written; at the prompt it ends the program.
std::atomic<bool> interrupted{false};
std::atomic<bool> answering{false};

void OnInterrupt(int) {
  if (!answering) _exit(130);
  interrupted = true;
}

void Print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

// Whoever answers: this process or a server.
class ChatPartner {
 public:
  virtual ~ChatPartner() = default;
  // Prints the answer as it comes; returns its text and puts its number of tokens in `tokens`.
  virtual StatusOr<std::string> Answer(const std::vector<ChatMessage>& messages, int* tokens) = 0;
  virtual std::string name() const = 0;
};

class LocalPartner : public ChatPartner {
 public:
  LocalPartner(std::unique_ptr<LocalModel> model, const ChatOptions& options)
      : model_(std::move(model)), options_(options) {}

  StatusOr<std::string> Answer(const std::vector<ChatMessage>& messages, int* tokens) override {
    ChatCompletionRequest request;
    request.messages = messages;
    if (options_.temperature >= 0) request.params.temperature = options_.temperature;
    if (options_.max_tokens > 0) request.params.max_tokens = options_.max_tokens;
    GLOAM_ASSIGN_OR_RETURN(auto prepared, model_->service().Prepare(request));
    std::string text;
    const auto summary = RunBlocking(model_->engine(), std::move(prepared), [&](const auto& delta) {
      Print(delta.text);
      text += delta.text;
      return !interrupted;
    });
    if (!summary.ok()) return summary.status();
    *tokens = summary->completion_tokens;
    return text;
  }

  std::string name() const override { return model_->service().model_name(); }

 private:
  const std::unique_ptr<LocalModel> model_;
  const ChatOptions& options_;
};

class RemotePartner : public ChatPartner {
 public:
  explicit RemotePartner(const ChatOptions& options) : options_(options) {}

  Status Init() {
    GLOAM_ASSIGN_OR_RETURN(auto client,
                           HttpClient::Connect(options_.model.model, options_.api_key));
    GLOAM_ASSIGN_OR_RETURN(const std::string body, client->Get("/v1/models"));
    const json models = json::parse(body, nullptr, /*allow_exceptions=*/false);
    if (!models.is_object() || !models.contains("data") || !models["data"].is_array() ||
        models["data"].empty()) {
      return Unavailable("{} lists no models", options_.model.model);
    }
    name_ = models["data"][0].value("id", std::string());
    return OkStatus();
  }

  StatusOr<std::string> Answer(const std::vector<ChatMessage>& messages, int* tokens) override {
    // A connection of its own, so that an interrupted answer can be left by closing it.
    GLOAM_ASSIGN_OR_RETURN(auto client,
                           HttpClient::Connect(options_.model.model, options_.api_key));
    json request = {{"model", name_},
                    {"stream", true},
                    {"stream_options", {{"include_usage", true}}},
                    {"messages", json::array()}};
    for (const ChatMessage& message : messages) {
      request["messages"].push_back({{"role", message.role}, {"content", message.content}});
    }
    if (options_.temperature >= 0) request["temperature"] = options_.temperature;
    if (options_.max_tokens > 0) request["max_completion_tokens"] = options_.max_tokens;
    std::string text;
    Status failure;
    const Status status =
        client->PostForEvents("/v1/chat/completions", request.dump(), [&](std::string_view data) {
          const json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
          if (!event.is_object()) return;
          if (event.contains("error")) {
            failure = Unavailable("{}", event["error"].value("message", std::string()));
            return;
          }
          if (event.contains("usage") && event["usage"].is_object()) {
            *tokens = event["usage"].value("completion_tokens", 0);
          }
          for (const json& choice : event.value("choices", json::array())) {
            const json delta = choice.value("delta", json::object());
            if (!delta.contains("content") || !delta["content"].is_string() || interrupted)
              continue;
            Print(delta["content"].get_ref<const std::string&>());
            text += delta["content"].get_ref<const std::string&>();
          }
        });
    GLOAM_RETURN_IF_ERROR(status);
    GLOAM_RETURN_IF_ERROR(failure);
    return text;
  }

  std::string name() const override { return name_; }

 private:
  const ChatOptions& options_;
  std::string name_;
};

StatusOr<std::unique_ptr<ChatPartner>> MakePartner(const ChatOptions& options) {
  if (HttpClient::IsUrl(options.model.model)) {
    auto partner = std::make_unique<RemotePartner>(options);
    GLOAM_RETURN_IF_ERROR(partner->Init());
    return std::unique_ptr<ChatPartner>(std::move(partner));
  }
  GLOAM_ASSIGN_OR_RETURN(auto model, LocalModel::Load(options.model));
  return std::unique_ptr<ChatPartner>(std::make_unique<LocalPartner>(std::move(model), options));
}

// Answers the last message and adds the answer to the conversation.
Status AnswerTurn(ChatPartner& partner, std::vector<ChatMessage>* messages, bool show_rate) {
  int tokens = 0;
  const auto start = Clock::now();
  interrupted = false;
  answering = true;
  auto text = partner.Answer(*messages, &tokens);
  answering = false;
  Print("\n");
  if (!text.ok()) return text.status();
  messages->push_back({"assistant", *std::move(text), nullptr});
  if (show_rate) {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    fmt::print("\033[2m{} tokens, {:.1f} tokens/s\033[0m\n", tokens, tokens / seconds);
  }
  return OkStatus();
}

int RunInteractive(ChatPartner& partner, std::vector<ChatMessage> messages) {
  const bool is_terminal = isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0;
  const std::vector<ChatMessage> beginning = messages;
  if (is_terminal) {
    fmt::print("Talking to {}. /clear starts anew, /exit ends, Ctrl-C stops an answer.\n",
               partner.name());
  }
  for (;;) {
    if (is_terminal) Print("\n> ");
    std::string line;
    if (!std::getline(std::cin, line) || line == "/exit") break;
    if (line.empty()) continue;
    if (line == "/clear") {
      messages = beginning;
      continue;
    }
    messages.push_back({"user", std::move(line), nullptr});
    if (const Status status = AnswerTurn(partner, &messages, is_terminal); !status.ok()) {
      Fail(status);
      if (!is_terminal) return kExitFailure;
      messages.pop_back();
    }
  }
  return 0;
}

}  // namespace

int RunChat(const ChatOptions& options) {
  auto partner = MakePartner(options);
  if (!partner.ok()) return Fail(partner.status());
  ::signal(SIGINT, OnInterrupt);
  std::vector<ChatMessage> messages;
  if (!options.system.empty()) messages.push_back({"system", options.system, nullptr});
  if (options.once.empty()) return RunInteractive(**partner, std::move(messages));
  messages.push_back({"user", options.once, nullptr});
  const Status status = AnswerTurn(**partner, &messages, /*show_rate=*/false);
  return status.ok() ? 0 : Fail(status);
}

int RunComplete(const CompleteOptions& options) {
  auto model = LocalModel::Load(options.model);
  if (!model.ok()) return Fail(model.status());
  CompletionRequest request;
  request.prompts.emplace_back(options.prompt);
  request.params.temperature = options.temperature;
  request.params.max_tokens = options.max_tokens;
  auto prepared = (*model)->service().Prepare(request);
  if (!prepared.ok()) return Fail(prepared.status());
  Print(options.prompt);
  const auto summary = RunBlocking((*model)->engine(), *std::move(prepared), [](const auto& delta) {
    Print(delta.text);
    return true;
  });
  Print("\n");
  return summary.ok() ? 0 : Fail(summary.status());
}

}  // namespace gloam
