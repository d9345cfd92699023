// `gloam eval BENCHMARK MODEL|URL` and `gloam calibrate MODEL`.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <utility>

#include "eval/channel_calibration.h"
#include "eval/forced_model.h"
#include "eval/runner.h"
#include "eval/tasks/tasks.h"
#include "models/catalog.h"
#include "server/cli/cli.h"
#include "server/cli/eval_generators.h"
#include "server/cli/load_progress.h"
#include "server/http/client.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;

StatusOr<std::string> ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read {}", path);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

TaskOptions CommonOptions(const EvalOptions& options) {
  return {.lengths = options.lengths,
          .num_samples = options.samples,
          .seed = options.seed,
          .chat = options.chat,
          .max_answer_tokens = options.answer_tokens};
}

StatusOr<std::unique_ptr<Task>> MakeRuler(const EvalOptions& options, TextGenerator& generator) {
  RulerOptions ruler{.common = CommonOptions(options), .kinds = options.kinds};
  if (!options.haystack.empty()) {
    GLOAM_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(options.haystack));
    ruler.common.haystack = SplitIntoSentences(text);
  }
  if (!options.qa_data.empty()) {
    GLOAM_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(options.qa_data));
    GLOAM_ASSIGN_OR_RETURN(ruler.qa, ParseQaData(text));
  }
  return MakeRulerTask(std::move(ruler), generator.tokenizer());
}

StatusOr<std::unique_ptr<Task>> MakeTask(const EvalOptions& options, TextGenerator& generator) {
  for (const int length : options.lengths) {
    if (options.benchmark != "longbench" && length > generator.max_model_len()) {
      return InvalidArgument("--lengths {} is more than the {} tokens that the model takes", length,
                             generator.max_model_len());
    }
  }
  if (options.benchmark == "passkey") {
    return MakePasskeyTask({.common = CommonOptions(options), .depths = options.depths},
                           generator.tokenizer());
  }
  if (options.benchmark == "ruler") return MakeRuler(options, generator);
  if (options.data.empty()) {
    return InvalidArgument("--data is missing: the folder with {}",
                           options.benchmark == "code" ? "source files" : "LongBench's files");
  }
  if (options.benchmark == "code") {
    return MakeCodeTask(
        {.common = CommonOptions(options), .folder = options.data, .extension = options.extension},
        generator.tokenizer());
  }
  // Room for the answer, at most 512 tokens in the published files, and for a chat's frame.
  constexpr int kAnswerAndFrame = 640;
  return MakeLongBenchTask(
      {.folder = options.data,
       .datasets = options.datasets,
       .max_prompt_tokens = options.max_prompt_tokens > 0
                                ? options.max_prompt_tokens
                                : std::max(1, generator.max_model_len() - kAnswerAndFrame),
       .num_samples = options.longbench_samples,
       .chat = options.chat},
      generator.tokenizer());
}

RunOptions MakeRunOptions(const EvalOptions& options, const std::string& model_name) {
  std::string folder_name = model_name;  // served names may hold slashes
  std::replace(folder_name.begin(), folder_name.end(), '/', '_');
  return {.folder = fs::path(options.out) / ("result_" + options.benchmark) / folder_name,
          .concurrency = options.concurrency,
          .progress = [](const std::string& line) { fmt::print(stderr, "{}\n", line); }};
}

StatusOr<std::string> RunGenerated(const EvalOptions& options) {
  const std::string& model = options.model.model;
  const bool remote = HttpClient::IsUrl(model);
  KnownPolicies known;
  if (remote) {
    GLOAM_ASSIGN_OR_RETURN(known, FetchPolicies(model, options.api_key));
  } else {
    known = BuiltinEvalPolicies();
  }
  GLOAM_ASSIGN_OR_RETURN(const auto policies, ReadEvalPolicies(options.policies, known));
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<TextGenerator> generator,
                         remote ? MakeHttpGenerator(model, options.api_key)
                                : MakeLocalGenerator(options.model, policies));
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<Task> task, MakeTask(options, *generator));
  const RunOptions run = MakeRunOptions(options, generator->model_name());
  fmt::print(stderr, "{} items, {} policies; results in {}\n", task->num_items(), policies.size(),
             run.folder.string());
  return RunTask(*task, *generator, policies, run);
}

CpuOptions CpuOptionsOf(const ServeOptions& options) {
  return {
      .num_threads = options.threads,
      .activations = options.activations == "f32" ? CpuActivations::kF32 : CpuActivations::kInt8};
}

// A model's path and name.
StatusOr<std::pair<fs::path, std::string>> FindModel(const std::string& model) {
  if (HttpClient::IsUrl(model)) {
    return InvalidArgument("this needs the logits of a model in this process: give MODEL, not {}",
                           model);
  }
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(model));
  if (!resolved.present) return NotFound("{} is not here yet: gloam pull {}", model, model);
  const std::string name = resolved.entry != nullptr ? resolved.entry->name
                           : resolved.path.extension() == ".gguf"
                               ? resolved.path.stem().string()
                               : fs::weakly_canonical(resolved.path).filename().string();
  return std::pair(resolved.path, name);
}

// Errors: kInvalidArgument where the settings ask for more than this command has.
Status CheckRunsOnCpu(const ServeOptions& options) {
  if (options.device == "cuda") return InvalidArgument("--device cuda: this runs on the CPU only");
  if (options.kv_cache_dtype == "fp8") {
    return InvalidArgument("--kv-cache-dtype fp8 needs a GPU; this runs on the CPU only");
  }
  return OkStatus();
}

StatusOr<std::string> RunForced(const EvalOptions& options) {
  GLOAM_RETURN_IF_ERROR(CheckRunsOnCpu(options.model));
  GLOAM_ASSIGN_OR_RETURN(const auto policies,
                         ReadEvalPolicies(options.policies, BuiltinEvalPolicies()));
  GLOAM_ASSIGN_OR_RETURN(const auto found, FindModel(options.model.model));
  ForcedModelOptions load{.name = found.second,
                          .cpu = CpuOptionsOf(options.model),
                          .activations = options.model.activations};
  const std::string& dtype = options.model.kv_cache_dtype;
  if (dtype != "auto") {
    load.kv_dtype = dtype == "f32" ? DType::kF32 : dtype == "f16" ? DType::kF16 : DType::kBF16;
  }
  LoadProgress progress(found.second);
  load.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  auto model = ForcedModel::Load(found.first, load);
  progress.Finish();
  if (!model.ok()) return model.status();
  const ForcedOptions forced{.benchmark = options.benchmark,
                             .texts = {options.texts.begin(), options.texts.end()},
                             .context = options.context,
                             .decoded = options.decoded,
                             .stride = options.stride,
                             .windows = options.windows};
  return RunForcedBenchmark(**model, forced, policies,
                            MakeRunOptions(options, (*model)->model_name()));
}

Status Calibrate(const CalibrateOptions& options) {
  GLOAM_RETURN_IF_ERROR(CheckRunsOnCpu(options.model));
  GLOAM_ASSIGN_OR_RETURN(const auto found, FindModel(options.model.model));
  const auto ops = MakeCpuOps(CpuOptionsOf(options.model));
  ChannelSums sums(*ops);
  LoadProgress progress(found.second);
  const LoadOptions load{
      .progress = [&](int64_t done, int64_t total) { progress.Update(done, total); }};
  auto model = LoadModel(found.first, sums, load);
  progress.Finish();
  if (!model.ok()) return model.status();
  std::vector<int32_t> tokens;
  for (const std::string& path : options.texts) {
    GLOAM_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path));
    const TextPart part{.text = text};
    GLOAM_ASSIGN_OR_RETURN(const auto more,
                           model->tokenizer->Encode({&part, 1}, /*add_special=*/false));
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  if (options.tokens > 0 && static_cast<int>(tokens.size()) > options.tokens) {
    tokens.resize(static_cast<size_t>(options.tokens));
  }
  GLOAM_ASSIGN_OR_RETURN(const auto channels,
                         CalibrateChannels(*model->model, sums, tokens, options.context));
  std::ofstream file(options.out, std::ios::binary);
  file << channels.dump() << "\n" << std::flush;
  if (!file) return Unavailable("cannot write {}", options.out);
  fmt::print(
      "{}: channels of {} tokens of text\n", options.out,
      tokens.size() / static_cast<size_t>(options.context) * static_cast<size_t>(options.context));
  return OkStatus();
}

}  // namespace

int RunEval(const EvalOptions& options) {
  const bool forced = options.benchmark == "ppl" || options.benchmark == "kl";
  const auto table = forced ? RunForced(options) : RunGenerated(options);
  if (!table.ok()) return Fail(table.status());
  fmt::print("{}", *table);
  return 0;
}

int RunCalibrate(const CalibrateOptions& options) {
  const Status status = Calibrate(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace gloam
