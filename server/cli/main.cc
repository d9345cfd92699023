// The program: parses the command line and hands over to a subcommand (server/cli/cli.h).
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <sstream>

#include "CLI/CLI.hpp"
#include "base/logging.h"
#include "fmt/ranges.h"
#include "models/random_model_file.h"
#include "server/cli/cli.h"
#include "server/cli/options.h"
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
const std::set<std::string> kComputeGroups = {"Model", "Compute and memory", "Scheduling"};

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
    AddEval();
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
        "throughput",
        "Prefill and decode in this process, by context and concurrency.\n"
        "prefill tok/s: prompt tokens until the last stream has its first token;\n"
        "decode tok/s: tokens of all streams from then until the last one;\n"
        "TTFT: time to the first token of any stream.");
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
    throughput_options_.policies = {"dense"};
    local
        ->add_option("--policies", throughput_options_.policies,
                     "Sparsity policies to measure in turn over the same prompts")
        ->delimiter(',')
        ->capture_default_str();
    local
        ->add_option("--text", throughput_options_.texts,
                     "Files to take prompts from (default: random tokens, whose attention is flat)")
        ->type_name("FILE");
    local->add_flag("--json", throughput_options_.json, "Print one JSON array of rows");
    local->add_option("--output-tokens", throughput_options_.output_tokens, "Tokens per answer")
        ->check(CLI::Range(2, 100000))
        ->capture_default_str();

    AddBenchAttention(*bench);
    AddBenchStep(*bench, "step", "A decode step by batch and context, without requests");
    AddBenchStep(*bench, "prefill", "From a prompt to its first token, without requests");
    AddBenchGemm(*bench);

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

  void AddEval() {
    CLI::App* eval = app_.add_subcommand("eval", "Measure what sparsity policies cost in quality");
    eval->require_subcommand(1);
    AddPasskey(AddBenchmark(eval, "passkey", "Find a number in a long text, by length and depth"));
    AddRuler(AddBenchmark(eval, "ruler", "RULER's kinds of task, made up at any length"));
    AddLongBench(AddBenchmark(eval, "longbench", "LongBench, from its published files"));
    AddCode(AddBenchmark(eval, "code", "The next line of a source file, given its repository"));
    AddForced(AddBenchmark(eval, "ppl", "Perplexity of long texts"));
    AddForced(AddBenchmark(eval, "kl", "Divergence from dense of the next-token distribution"));

    CLI::App* calibrate = Add("calibrate", "Find the channels that a ds selector looks at", [this] {
      return WithSettings(*calibrate_, [this](const ServeOptions& options) {
        calibrate_options_.model = options;
        return WithQuietLog([this] { return RunCalibrate(calibrate_options_); });
      });
    });
    calibrate_ = std::make_unique<SettingsFlags>(calibrate, kComputeGroups,
                                                 "GGUF file, folder, or catalogue name");
    CalibrateOptions& o = calibrate_options_;
    calibrate->add_option("--text", o.texts, "Plain text files")->required();
    calibrate->add_option("--out", o.out, "File to write")->type_name("FILE")->required();
    AddCount(calibrate, "--context", &o.context, "Tokens of one piece of text");
    AddCount(calibrate, "--tokens", &o.tokens, "Tokens of the texts at most; 0: all");
  }

  // A subcommand of eval, with the flags that all have.
  CLI::App* AddBenchmark(CLI::App* eval, const std::string& name, const char* help) {
    CLI::App* command = eval->add_subcommand(name, help);
    command->callback([this, name] {
      run_ = [this, name] {
        return WithSettings(*eval_[name], [this, name](const ServeOptions& options) {
          eval_options_.model = options;
          eval_options_.benchmark = name;
          return WithQuietLog([this] { return RunEval(eval_options_); });
        });
      };
    });
    const bool needs_logits = name == "ppl" || name == "kl";
    eval_[name] = std::make_unique<SettingsFlags>(
        command, kComputeGroups,
        needs_logits ? "GGUF file, folder, or catalogue name"
                     : "GGUF file, folder, catalogue name, or http://HOST:PORT");
    EvalOptions& o = eval_options_;
    command
        ->add_option("--policies", o.policies,
                     "Names, NAME:p=0.9:token_budget=N, FILE.json or LABEL={...}, with commas "
                     "between; dense and the controls come by themselves")
        ->capture_default_str();
    command->add_option("--out", o.out, "Folder of result_BENCHMARK/MODEL/")
        ->type_name("DIR")
        ->capture_default_str();
    if (needs_logits) return command;
    command->add_option("--api-key", o.api_key, "Key of the server")->type_name("KEY");
    command->add_option("--concurrency", o.concurrency, "Policies of one item at a time")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    return command;
  }

  static void AddCount(CLI::App* command, const char* flag, int* value, const char* help) {
    command->add_option(flag, *value, help)->check(CLI::NonNegativeNumber)->capture_default_str();
  }

  void AddLengths(CLI::App* command) {
    EvalOptions& o = eval_options_;
    command->add_option("--lengths", o.lengths, "Tokens of prompt and answer together")
        ->delimiter(',')
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command->add_option("--samples", o.samples, "Items of each cell")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command->add_option("--seed", o.seed, "Of what is drawn")->capture_default_str();
    AddCount(command, "--answer-tokens", &o.answer_tokens, "0: the benchmark's own");
  }

  void AddPasskey(CLI::App* command) {
    AddLengths(command);
    command->add_flag("--chat", eval_options_.chat, "Use the model's chat template");
    command->add_option("--depths", eval_options_.depths, "0: beginning of the text, 1: its end")
        ->delimiter(',')
        ->check(CLI::Range(0.0, 1.0))
        ->capture_default_str();
  }

  void AddRuler(CLI::App* command) {
    EvalOptions& o = eval_options_;
    AddLengths(command);
    command->add_flag("--chat", o.chat, "Use the model's chat template");
    command->add_option("--kinds", o.kinds, "niah_single_1, ..., vt, cwe, fwe, qa; default: all")
        ->delimiter(',');
    command->add_option("--haystack", o.haystack, "Text that hides the needles")->type_name("FILE");
    command->add_option("--qa-data", o.qa_data, "Questions in SQuAD's format")->type_name("FILE");
  }

  void AddLongBench(CLI::App* command) {
    EvalOptions& o = eval_options_;
    command->add_flag("--chat", o.chat, "Use the chat template where LongBench does");
    command->add_option("--data", o.data, "Folder of the published files")->type_name("DIR");
    command->add_option("--datasets", o.datasets, "Default: all in the folder")->delimiter(',');
    AddCount(command, "--max-prompt-tokens", &o.max_prompt_tokens,
             "Longer prompts lose their middle; 0: what the model takes");
    AddCount(command, "--samples", &o.longbench_samples, "First items of each data set; 0: all");
  }

  void AddCode(CLI::App* command) {
    AddLengths(command);
    command->add_option("--data", eval_options_.data, "Folder of source files")->type_name("DIR");
    command->add_option("--extension", eval_options_.extension, "Of the source files")
        ->capture_default_str();
  }

  void AddForced(CLI::App* command) {
    EvalOptions& o = eval_options_;
    command->add_option("--text", o.texts, "Long plain text files")->type_name("FILE ...");
    AddCount(command, "--context", &o.context, "Tokens prefilled densely, a multiple of 16");
    AddCount(command, "--decoded", &o.decoded, "Tokens after them, under every policy");
    AddCount(command, "--stride", &o.stride, "Tokens between windows' starts; 0: no overlap");
    AddCount(command, "--windows", &o.windows, "Of each text at most; 0: all");
  }

  void AddBenchAttention(CLI::App& bench) {
    BenchAttentionOptions& o = bench_attention_options_;
    o.policies = {"twilight", "quest_twi", "quest_1024"};
    o.contexts = {4096, 7680};
    o.batches = {1};
    CLI::App* command =
        AddModelBench(bench, "attention",
                      "Decode attention: by stage, on queries and keys of a model's run over text, "
                      "on the CPU; or, "
                      "with --random-weights, dense attention of that shape on either device",
                      o, RunBenchAttention);
    auto* replay = command->add_option("--replay", o.replay, "Recorded profile to measure on")
                       ->type_name("FILE")
                       ->check(CLI::ExistingFile)
                       ->excludes(command->get_option("MODEL"))
                       ->excludes(command->get_option("--random-weights"));
    command->add_option("--text", o.texts, "Files of text to run the model over")
        ->type_name("FILE")
        ->excludes(replay);
    command->add_option("--record", o.record, "Keep the profile in this file")->type_name("FILE");
    command->add_option("--policies", o.policies, "Policies to measure beside dense")
        ->delimiter(',')
        ->capture_default_str();
    AddCounts(command, "--context", o.contexts, "Contexts in tokens");
    AddCounts(command, "--batch", o.batches, "Sequences that decode together");
    command->add_option("--layers", o.layers, "Layers to record (default: six, spread)")
        ->delimiter(',');
    command->add_option("--repeats", o.repeats, "Runs per layer; the median counts")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
  }

  // A bench of a model's parts: `run` gets the options, whose model's settings are parsed by then.
  template <typename Options>
  CLI::App* AddModelBench(CLI::App& bench, const std::string& name, const char* help, Options& o,
                          int (*run)(const Options&)) {
    CLI::App* command = bench.add_subcommand(name, help);
    std::unique_ptr<SettingsFlags>& settings = model_bench_settings_[name];
    settings = std::make_unique<SettingsFlags>(command, kLocalGroups, "");
    command->callback([this, &o, &settings, run] {
      run_ = [this, &o, &settings, run] {
        return WithSettings(*settings, [&o, run](const ServeOptions& options) {
          o.model.settings = options;
          return WithQuietLog([&o, run] { return run(o); });
        });
      };
    });
    auto* model =
        command->add_option("MODEL", o.model.name, "GGUF file, folder, or catalogue name");
    command
        ->add_option("--random-weights", o.model.random_weights,
                     fmt::format("Instead of a model: random weights of the shape of {}",
                                 fmt::join(RandomModelFile::ShapeNames(), ", ")))
        ->excludes(model);
    command->add_option("--random-weight-type", o.model.random_weight_type, "bf16, q4_0 or q8_0")
        ->capture_default_str();
    command->add_flag("--json", o.json, "Print one JSON object");
    return command;
  }

  static void AddCounts(CLI::App* command, const char* name, std::vector<int>& counts,
                        const char* help) {
    command->add_option(name, counts, help)
        ->delimiter(',')
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
  }

  void AddBenchStep(CLI::App& bench, const std::string& name, const char* help) {
    BenchStepOptions& o = bench_step_options_[name];
    o.prefill = name == "prefill";
    o.contexts = {2048, 8192};
    CLI::App* command = AddModelBench(bench, name, help, o, RunBenchStep);
    AddCounts(command, "--context", o.contexts, "Contexts in tokens");
    if (o.prefill) return;
    AddCounts(command, "--batch", o.batches, "Sequences that decode together");
    command->add_option("--steps", o.steps, "Steps that count; the median is reported")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
  }

  void AddBenchGemm(CLI::App& bench) {
    BenchGemmOptions& o = bench_gemm_options_;
    CLI::App* command =
        AddModelBench(bench, "gemm", "Matrix products of a model, one by one", o, RunBenchGemm);
    AddCounts(command, "--batch", o.rows, "Rows that are multiplied at a time");
    command->add_option("--repeats", o.repeats, "Runs over all layers; the median is reported")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
  }

  CLI::App app_;
  std::function<int()> run_;
  std::map<std::string, std::unique_ptr<SettingsFlags>> eval_;  // by benchmark
  std::unique_ptr<SettingsFlags> calibrate_;
  EvalOptions eval_options_;
  CalibrateOptions calibrate_options_;
  std::unique_ptr<SettingsFlags> serve_, chat_, complete_, health_, bench_;
  ChatOptions chat_options_;
  CompleteOptions complete_options_;
  BenchThroughputOptions throughput_options_;
  BenchServeOptions bench_serve_options_;
  BenchAttentionOptions bench_attention_options_;
  BenchGemmOptions bench_gemm_options_;
  std::map<std::string, BenchStepOptions> bench_step_options_;                  // by subcommand
  std::map<std::string, std::unique_ptr<SettingsFlags>> model_bench_settings_;  // likewise
  std::string name_;
  bool list_tensors_ = false;
};

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) { return gloam::Program().Run(argc, argv); }
