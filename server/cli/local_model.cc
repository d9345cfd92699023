#include "server/cli/local_model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <utility>

#include "base/logging.h"
#include "engine/kv_cache_pool.h"
#include "engine/memory_plan.h"
#include "models/catalog.h"
#include "models/pull.h"
#include "models/pull_printer.h"
#include "server/cli/backend.h"
#include "server/cli/load_progress.h"
#include "server/cli/system_info.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMinKvCacheBytes = int64_t{64} << 20;
constexpr double kFreeMemoryShare = 0.25;  // the rest is for the page cache and other programs

StatusOr<std::filesystem::path> FindOrPull(const ResolvedModel& resolved) {
  if (resolved.present) return resolved.path;
  PullPrinter printer(std::cerr, isatty(STDERR_FILENO) != 0);
  PullOptions options;
  options.folder = resolved.path.parent_path();
  options.progress = [&](const PullProgress& progress) { printer.Show(progress); };
  auto path = PullModel(*resolved.entry, options);
  printer.Finish();
  return path;
}

std::string TokenName(const Tokenizer& tokenizer, std::optional<int32_t> id) {
  return id ? std::string(tokenizer.TokenBytes(*id, /*skip_special=*/false)) : std::string();
}

StatusOr<std::string> ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read {}", path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// The model's own template, or the one of --chat-template; null where there is none.
StatusOr<std::unique_ptr<ChatTemplate>> MakeChatTemplate(const ServeOptions& options,
                                                         const std::string& model_template,
                                                         const Tokenizer& tokenizer) {
  std::string source = model_template;
  if (!options.chat_template.empty()) {
    GLOAM_ASSIGN_OR_RETURN(source, ReadTextFile(options.chat_template));
  }
  if (source.empty()) return std::unique_ptr<ChatTemplate>();
  const auto eos = tokenizer.eos_ids();
  auto parsed =
      ChatTemplate::Parse(source, TokenName(tokenizer, tokenizer.bos_id()),
                          eos.empty() ? std::string() : TokenName(tokenizer, eos.front()));
  if (!parsed.ok()) {
    return InvalidArgument(
        "{}: {}",
        options.chat_template.empty() ? "the model's chat template" : options.chat_template,
        MessageOf(parsed.status()));
  }
  return parsed;
}

int64_t DefaultKvCacheBytes() {
  const auto free = static_cast<double>(AvailableMemoryBytes());
  return std::max(kMinKvCacheBytes, static_cast<int64_t>(free * kFreeMemoryShare));
}

// Far above the longest step of a GPU, 16384 tokens of prefill at full context.
constexpr double kGpuStepTimeout = 60;  // seconds

}  // namespace

StatusOr<std::unique_ptr<LocalModel>> LocalModel::Load(const ServeOptions& options) {
  std::unique_ptr<LocalModel> local(new LocalModel());
  try {
    GLOAM_RETURN_IF_ERROR(local->Start(options));
  } catch (const std::exception& error) {  // a device that failed
    return Internal("{}", error.what());
  }
  return local;
}

Status LocalModel::Start(const ServeOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(options.model));
  GLOAM_ASSIGN_OR_RETURN(const std::filesystem::path path, FindOrPull(resolved));
  const std::string name = resolved.entry != nullptr ? resolved.entry->name
                           : path.extension() == ".gguf"
                               ? path.stem().string()
                               : std::filesystem::weakly_canonical(path).filename().string();

  GLOAM_ASSIGN_OR_RETURN(ops_, MakeBackend(options));
  compute_ = ops_->device() == Device::kCpu
                 ? fmt::format("cpu ({}), {} activations", CpuModelName(), options.activations)
                 : fmt::format("{}, bf16{}{}", ops_->DeviceName(),
                               options.quantization == "fp8" ? ", fp8 weights" : "",
                               options.batch_invariant ? ", batch-invariant" : "");

  LoadProgress progress(name);
  LoadOptions load;
  load.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  auto loaded = LoadModel(path, *ops_, load);
  progress.Finish();
  if (!loaded.ok()) return loaded.status();
  GLOAM_RETURN_IF_ERROR(StartEngine(options, name, path, *std::move(loaded)));
  load_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return OkStatus();
}

Status LocalModel::StartEngine(const ServeOptions& options, const std::string& name,
                               const std::filesystem::path& path, LoadedModel loaded) {
  const bool on_gpu = ops_->device() == Device::kCuda;
  weight_bytes_ = loaded.model->weight_bytes();
  tokenizer_ = std::move(loaded.tokenizer);
  GLOAM_ASSIGN_OR_RETURN(chat_template_,
                         MakeChatTemplate(options, loaded.chat_template, *tokenizer_));

  GenerationServiceOptions service_options;
  service_options.served_model_names = options.served_model_names;
  if (service_options.served_model_names.empty()) service_options.served_model_names = {name};
  metrics_ = std::make_unique<MetricsRegistry>(service_options.served_model_names.front());

  PolicyRegistryOptions policies;
  policies.folder = options.sparsity_dir;
  policies.default_policy = options.sparsity;
  if (options.sparsity_policies != "all") policies.enabled = SplitCommas(options.sparsity_policies);
  policies.model_name = name;
  policies.model_folder = fs::is_directory(path) ? path : path.parent_path();
  policies.device = ops_->device();
  GLOAM_ASSIGN_OR_RETURN(PolicyRegistry registry,
                         PolicyRegistry::Load(policies, loaded.model->config()));
  service_options.policies = std::make_shared<const PolicyRegistry>(std::move(registry));

  EngineOptions engine;
  engine.sidecars = service_options.policies->sidecars();
  engine.max_model_len = options.max_model_len;
  engine.max_num_seqs = options.max_num_seqs;
  const BatchedTokens batched_tokens = BatchedTokensOf(options, *ops_);
  engine.max_num_batched_tokens = batched_tokens.max;
  engine.max_tokens_beside_decode = batched_tokens.beside_decode;
  engine.max_queued_requests = options.max_queued_requests;
  engine.kv_cache_bytes = options.kv_cache_memory;
  if (engine.kv_cache_bytes == 0 && !on_gpu) engine.kv_cache_bytes = DefaultKvCacheBytes();
  if (on_gpu) engine.step_timeout = kGpuStepTimeout;
  engine.gpu_memory_utilization = options.gpu_memory_utilization;
  engine.kv_cache_dtype = KvDTypeOf(options, loaded.model->config());
  kv_cache_dtype_ = engine.kv_cache_dtype;
  engine.enable_prefix_caching = options.enable_prefix_caching;
  GLOAM_ASSIGN_OR_RETURN(
      engine_, Engine::Create(engine, *ops_, std::move(loaded.model), *tokenizer_, *metrics_));
  service_ = std::make_unique<GenerationService>(std::move(service_options), *engine_, *tokenizer_,
                                                 chat_template_.get(), loaded.generation_defaults);
  return OkStatus();
}

std::string LocalModel::Describe() const {
  const ModelConfig& config = engine_->model_config();
  const EngineStats stats = engine_->stats();
  const int64_t kv_tokens = stats.num_blocks_total * kBlockTokens;
  const PolicyRegistry& policies = service_->policies();
  const auto num_usable = std::count_if(policies.policies().begin(), policies.policies().end(),
                                        [](const NamedPolicy& policy) { return policy.usable(); });
  std::string text = fmt::format(
      "  model     {} ({}, {} layers, {}/{} heads x {}), context {} tokens\n"
      "  compute   {}, weights {:.2f} GB, loaded in {:.2f} s\n"
      "  KV cache  {} blocks of {}, {} tokens in {}: {:.1f} requests of full length\n"
      "  sparsity  {} by default, {} of {} policies usable\n",
      service_->model_name(), config.architecture, config.num_layers, config.num_heads,
      config.num_kv_heads, config.head_dim, engine_->max_model_len(), compute_,
      static_cast<double>(weight_bytes_) / 1e9, load_seconds_, stats.num_blocks_total, kBlockTokens,
      kv_tokens, KvDTypeName(kv_cache_dtype_),
      static_cast<double>(kv_tokens) / engine_->max_model_len(), policies.default_name(),
      num_usable, policies.policies().size());
  if (kv_cache_dtype_ == DType::kF8E4M3 && !SuitsFp8Kv(config)) {
    text += "  warning   attention biases make this model's keys too large for fp8 (auto: f16)\n";
  }
  if (engine_->memory_plan() != nullptr) {
    text += "  memory\n" + engine_->memory_plan()->Table(/*indent=*/12);
  }
  return text;
}

}  // namespace gloam
