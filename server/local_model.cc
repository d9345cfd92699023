#include "server/local_model.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <utility>

#include "models/catalog.h"
#include "models/pull.h"
#include "models/pull_printer.h"
#include "server/load_progress.h"
#include "server/system_info.h"

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

DType KvDType(std::string_view name) {
  if (name == "f32") return DType::kF32;
  return name == "bf16" ? DType::kBF16 : DType::kF16;
}

}  // namespace

StatusOr<std::unique_ptr<LocalModel>> LocalModel::Load(const ServeOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(options.model));
  GLOAM_ASSIGN_OR_RETURN(const std::filesystem::path path, FindOrPull(resolved));
  std::string name = resolved.entry != nullptr ? resolved.entry->name
                     : path.extension() == ".gguf"
                         ? path.stem().string()
                         : std::filesystem::weakly_canonical(path).filename().string();

  std::unique_ptr<LocalModel> local(new LocalModel());
  CpuOptions cpu;
  cpu.num_threads = options.threads;
  cpu.activations = options.activations == "f32" ? CpuActivations::kF32 : CpuActivations::kInt8;
  local->ops_ = MakeCpuOps(cpu);
  local->activations_ = options.activations;

  LoadProgress progress(name);
  LoadOptions load;
  load.progress = [&](int64_t done, int64_t total) { progress.Update(done, total); };
  auto loaded = LoadModel(path, *local->ops_, load);
  progress.Finish();
  if (!loaded.ok()) return loaded.status();
  local->weight_bytes_ = loaded->model->weight_bytes();
  local->kv_cache_dtype_ = options.kv_cache_dtype;
  if (local->kv_cache_dtype_ == "auto") {
    const bool half = DefaultKvDType(loaded->model->config()) == DType::kF16;
    local->kv_cache_dtype_ = half ? "f16" : "bf16";
  }
  local->tokenizer_ = std::move(loaded->tokenizer);
  GLOAM_ASSIGN_OR_RETURN(local->chat_template_,
                         MakeChatTemplate(options, loaded->chat_template, *local->tokenizer_));

  GenerationServiceOptions service_options;
  service_options.served_model_names = options.served_model_names;
  if (service_options.served_model_names.empty()) service_options.served_model_names = {name};
  local->metrics_ = std::make_unique<MetricsRegistry>(service_options.served_model_names.front());

  PolicyRegistryOptions policies;
  policies.folder = options.sparsity_dir;
  policies.default_policy = options.sparsity;
  if (options.sparsity_policies != "all") policies.enabled = SplitCommas(options.sparsity_policies);
  policies.model_name = name;
  policies.model_folder = fs::is_directory(path) ? path : path.parent_path();
  GLOAM_ASSIGN_OR_RETURN(PolicyRegistry registry,
                         PolicyRegistry::Load(policies, loaded->model->config()));
  service_options.policies = std::make_shared<const PolicyRegistry>(std::move(registry));

  EngineOptions engine;
  engine.sidecars = service_options.policies->sidecars();
  engine.max_model_len = options.max_model_len;
  engine.max_num_seqs = options.max_num_seqs;
  engine.max_num_batched_tokens = options.max_num_batched_tokens;
  engine.max_queued_requests = options.max_queued_requests;
  engine.kv_cache_bytes =
      options.kv_cache_memory > 0 ? options.kv_cache_memory : DefaultKvCacheBytes();
  engine.kv_cache_dtype = KvDType(local->kv_cache_dtype_);
  engine.enable_prefix_caching = options.enable_prefix_caching;
  GLOAM_ASSIGN_OR_RETURN(local->engine_,
                         Engine::Create(engine, *local->ops_, std::move(loaded->model),
                                        *local->tokenizer_, *local->metrics_));
  local->service_ = std::make_unique<GenerationService>(
      std::move(service_options), *local->engine_, *local->tokenizer_, local->chat_template_.get(),
      loaded->generation_defaults);
  local->load_seconds_ =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return local;
}

std::string LocalModel::Describe() const {
  const ModelConfig& config = engine_->model_config();
  const EngineStats stats = engine_->stats();
  const int64_t kv_tokens = stats.num_blocks_total * kBlockTokens;
  const PolicyRegistry& policies = service_->policies();
  const auto num_usable = std::count_if(policies.policies().begin(), policies.policies().end(),
                                        [](const NamedPolicy& policy) { return policy.usable(); });
  return fmt::format(
      "  model     {} ({}, {} layers, {}/{} heads x {}), context {} tokens\n"
      "  compute   cpu ({}), {} activations, weights {:.2f} GB, loaded in {:.2f} s\n"
      "  KV cache  {} blocks of {}, {} tokens in {}: {:.1f} requests of full length\n"
      "  sparsity  {} by default, {} of {} policies usable\n",
      service_->model_name(), config.architecture, config.num_layers, config.num_heads,
      config.num_kv_heads, config.head_dim, engine_->max_model_len(), CpuModelName(), activations_,
      static_cast<double>(weight_bytes_) / 1e9, load_seconds_, stats.num_blocks_total, kBlockTokens,
      kv_tokens, kv_cache_dtype_, static_cast<double>(kv_tokens) / engine_->max_model_len(),
      policies.default_name(), num_usable, policies.policies().size());
}

}  // namespace gloam
