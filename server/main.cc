// The program: parses the command line and hands over to a subcommand (server/cli.h).
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <sstream>

#include "CLI/CLI.hpp"
#include "base/logging.h"
#include "server/cli.h"
#include "server/options.h"
#include "server/version.h"

namespace gloam {
namespace {

// The settings of ServeOptions as flags of one subcommand, read back after parsing.
class SettingsFlags {
 public:
  // `groups`: those that the subcommand has a use for; empty: all. `model_help`: empty for a
  // subcommand that takes no model.
  SettingsFlags(CLI::App* app, std::set<std::string> groups, std::string model_help)
      : table_(&options_), needs_model_(!model_help.empty()) {
    if (needs_model_) app->add_option("MODEL", model_, std::move(model_help))->group("Model");
    for (const OptionSpec& spec : table_.specs()) {
      if (spec.name == "model") continue;
      if (!groups.empty() && groups.count(spec.group) == 0) continue;
      Add(app, spec);
    }
    app->add_option("--config", config_file_,
                    "JSON file of settings: {\"port\": 9000, \"max-model-len\": 4096}")
        ->type_name("FILE")
        ->group("Settings");
    app->add_flag("--print-config", print_config_,
                  "Print every setting, its value and where it came from, then exit")
        ->group("Settings");
  }

  // The settings from all sources. Errors name the setting and the source.
  StatusOr<ServeOptions> Read() {
    OptionTable::Values flags;
    for (const auto& [name, option] : flags_) {
      if (option->count() > 0) flags[name] = raw_[name];
    }
    for (const auto& [name, on_and_off] : bool_flags_) {
      const auto& [on, off] = on_and_off;
      if (on->count() + off->count() > 0) flags[name] = {off->count() > 0 ? "false" : "true"};
    }
    if (!model_.empty()) flags["model"] = {model_};
    std::string config;
    if (!config_file_.empty()) {
      std::ifstream file(config_file_);
      if (!file) return InvalidArgument("--config: cannot read {}", config_file_);
      std::ostringstream text;
      text << file.rdbuf();
      config = text.str();
    }
    const auto environment = [](const std::string& name) -> std::optional<std::string> {
      const char* value = std::getenv(name.c_str());
      return value == nullptr ? std::nullopt : std::optional<std::string>(value);
    };
    GLOAM_RETURN_IF_ERROR(table_.Apply(flags, environment, config));
    if (print_config_) {
      fmt::print("{}", table_.Describe());
      std::exit(0);
    }
    if (needs_model_ && options_.model.empty()) {
      return InvalidArgument("MODEL is missing: a GGUF file, a folder, or a name of the catalogue");
    }
    return options_;
  }

 private:
  void Add(CLI::App* app, const OptionSpec& spec) {
    const std::string initial = spec.get();
    if (spec.kind == OptionSpec::Kind::kFlag) {
      CLI::Option* on = app->add_flag("--" + spec.name, spec.help)->group(spec.group);
      CLI::Option* off = app->add_flag("--no-" + spec.name)->group(spec.group);
      off->description("The opposite");
      on->option_text(fmt::format("[{}]", initial))->excludes(off);
      bool_flags_[spec.name] = {on, off};
      return;
    }
    CLI::Option* option =
        app->add_option("--" + spec.name, raw_[spec.name], spec.help)->group(spec.group);
    option->type_name(spec.value_name + (initial.empty() ? "" : " [" + initial + "]"));
    option->expected(1);
    option->multi_option_policy(spec.kind == OptionSpec::Kind::kList
                                    ? CLI::MultiOptionPolicy::TakeAll
                                    : CLI::MultiOptionPolicy::TakeLast);
    flags_[spec.name] = option;
  }

  ServeOptions options_;
  OptionTable table_;
  const bool needs_model_;
  std::string model_;
  std::string config_file_;
  bool print_config_ = false;
  std::map<std::string, std::vector<std::string>> raw_;
  std::map<std::string, CLI::Option*> flags_;
  std::map<std::string, std::pair<CLI::Option*, CLI::Option*>> bool_flags_;  // --x, --no-x
};

const std::set<std::string> kLocalGroups = {"Model", "Compute and memory", "Scheduling",
                                            "Sparsity"};

// A usage error of the settings, or the subcommand's own exit code.
int WithSettings(SettingsFlags& flags, const std::function<int(const ServeOptions&)>& run) {
  const auto options = flags.Read();
  if (!options.ok()) {
    Fail(options.status());
    return kExitUsage;
  }
  return run(*options);
}

// Subcommands that compute in this process log only what is wrong.
int WithQuietLog(const std::function<int()>& run) {
  if (const Status status = InitLogging("warn", LogFormat::kText); !status.ok()) {
    return Fail(status);
  }
  const int code = run();
  spdlog::shutdown();
  return code;
}

class Program {
 public:
  Program() : app_("Gloam: an OpenAI-compatible server for Llama-family models", "gloam") {
    app_.set_version_flag("--version", std::string("gloam ") + kVersion);
    app_.require_subcommand(1);
    app_.get_formatter()->column_width(44);
    AddServe();
    AddChat();
    AddComplete();
    AddModelTools();
    AddBench();
  }

  int Run(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      const bool asked = error.get_exit_code() == 0;  // --help, --version
      return app_.exit(error) == 0 && asked ? 0 : kExitUsage;
    }
    return run_();
  }

 private:
  CLI::App* Add(const char* name, const char* help, std::function<int()> run) {
    CLI::App* command = app_.add_subcommand(name, help);
    command->callback([this, run = std::move(run)] { run_ = run; });
    return command;
  }

  void AddServe() {
    CLI::App* command = Add("serve", "Serve a model over HTTP and gRPC",
                            [this] { return WithSettings(*serve_, RunServe); });
    serve_ =
        std::make_unique<SettingsFlags>(command, std::set<std::string>(),
                                        "GGUF file, Hugging Face folder, or name of the catalogue");
    command->footer(
        "Every setting may also come from the environment (GLOAM_MAX_MODEL_LEN=4096) or from the\n"
        "file of --config. Precedence: flag, environment, file, default.");
  }

  void AddChat() {
    CLI::App* command = Add("chat", "Talk to a model, or to a server by its URL", [this] {
      return WithSettings(*chat_, [this](const ServeOptions& options) {
        chat_options_.model = options;
        return WithQuietLog([this] { return RunChat(chat_options_); });
      });
    });
    chat_ = std::make_unique<SettingsFlags>(
        command, kLocalGroups, "GGUF file, folder, catalogue name, or http://HOST:PORT");
    command->add_option("--once", chat_options_.once, "Answer this message, then exit")
        ->type_name("TEXT");
    command->add_option("--system", chat_options_.system, "System message")->type_name("TEXT");
    command->add_option("--api-key", chat_options_.api_key, "Key of the server")->type_name("KEY");
    command->add_option("--temperature", chat_options_.temperature, "Default: the model's")
        ->check(CLI::Range(0.0, 2.0));
    command->add_option("--max-tokens", chat_options_.max_tokens, "Length of an answer at most")
        ->check(CLI::PositiveNumber);
  }

  void AddComplete() {
    CLI::App* command = Add("complete", "Print one completion of a text", [this] {
      return WithSettings(*complete_, [this](const ServeOptions& options) {
        complete_options_.model = options;
        return WithQuietLog([this] { return RunComplete(complete_options_); });
      });
    });
    complete_ = std::make_unique<SettingsFlags>(command, kLocalGroups,
                                                "GGUF file, folder, or catalogue name");
    command->add_option("PROMPT", complete_options_.prompt, "Text to continue")->required();
    command->add_option("--temperature", complete_options_.temperature, "0: the likeliest text")
        ->check(CLI::Range(0.0, 2.0))
        ->capture_default_str();
    command->add_option("--max-tokens", complete_options_.max_tokens, "Tokens to add at most")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
  }

  void AddModelTools() {
    CLI::App* pull =
        Add("pull", "Fetch a model of the catalogue", [this] { return RunPull(name_); });
    pull->add_option("NAME", name_, "Name in the catalogue")->required();
    CLI::App* inspect = Add("inspect", "Show what a model's files hold",
                            [this] { return RunInspect(name_, list_tensors_); });
    inspect->add_option("MODEL", name_, "GGUF file, folder, or catalogue name")->required();
    inspect->add_flag("--tensors", list_tensors_, "List every tensor");
    Add("doctor", "Check this machine and what the program would find on it",
        [] { return RunDoctor(ServeOptions()); });
    CLI::App* health = Add("health", "Ask the server at --host and --port whether it is ready",
                           [this] { return WithSettings(*health_, RunHealth); });
    health_ = std::make_unique<SettingsFlags>(health, std::set<std::string>{"Network"}, "");
  }

  void AddBench() {
    CLI::App* bench = app_.add_subcommand("bench", "Measure speed");
    bench->require_subcommand(1);
    CLI::App* local = bench->add_subcommand(
        "throughput", "Prefill and decode in this process, by context and concurrency");
    local->callback([this] {
      run_ = [this] {
        return WithSettings(*bench_, [this](const ServeOptions& options) {
          throughput_options_.model = options;
          return WithQuietLog([this] { return RunBenchThroughput(throughput_options_); });
        });
      };
    });
    bench_ = std::make_unique<SettingsFlags>(local, kLocalGroups,
                                             "GGUF file, folder, or catalogue name");
    throughput_options_.context_tokens = {128, 512, 2048};
    throughput_options_.concurrency = {1, 8, 32};
    local->add_option("--context", throughput_options_.context_tokens, "Prompt lengths in tokens")
        ->delimiter(',')
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    local->add_option("--concurrency", throughput_options_.concurrency, "Streams at a time")
        ->delimiter(',')
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    local->add_flag("--json", throughput_options_.json, "Print one JSON array of rows");
    local->add_option("--output-tokens", throughput_options_.output_tokens, "Tokens per answer")
        ->check(CLI::Range(2, 100000))
        ->capture_default_str();

    CLI::App* remote =
        bench->add_subcommand("serve", "Load a running server with streams over HTTP");
    remote->callback([this] { run_ = [this] { return RunBenchServe(bench_serve_options_); }; });
    BenchServeOptions& o = bench_serve_options_;
    remote->add_option("URL", o.url, "http://HOST:PORT")->required();
    remote->add_option("--api-key", o.api_key, "Key of the server");
    remote->add_option("--model", o.model, "Name of the model (default: the served one)");
    remote->add_option("--streams", o.num_streams, "Streams at a time")
        ->check(CLI::Range(1, 10000))
        ->capture_default_str();
    remote->add_option("--requests", o.num_requests, "Requests in all")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    remote->add_option("--prompt-words", o.prompt_words, "Words of every prompt")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    remote->add_option("--output-tokens", o.output_tokens, "Tokens per answer")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
  }

  CLI::App app_;
  std::function<int()> run_;
  std::unique_ptr<SettingsFlags> serve_, chat_, complete_, health_, bench_;
  ChatOptions chat_options_;
  CompleteOptions complete_options_;
  BenchThroughputOptions throughput_options_;
  BenchServeOptions bench_serve_options_;
  std::string name_;
  bool list_tensors_ = false;
};

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) { return gloam::Program().Run(argc, argv); }
