#include "eval/attention_profile.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <numeric>

#include "engine/kv_cache_pool.h"
#include "engine/model_runner.h"
#include "eval/profiling_ops.h"
#include "nlohmann/json.hpp"

namespace gloam {
namespace {

constexpr const char* kFormat = "gloam attention profile 1";
constexpr int kChunkTokens = 512;

Status CheckProfileOptions(const ModelConfig& config, size_t num_tokens,
                           const ProfileOptions& options) {
  GLOAM_CHECK(options.num_queries >= 1 && options.num_queries <= kChunkTokens);
  if (options.context < options.num_queries || options.context > config.max_position) {
    return InvalidArgument("--context {} is not in [{}, {}]", options.context, options.num_queries,
                           config.max_position);
  }
  if (num_tokens < static_cast<size_t>(options.context)) {
    return InvalidArgument("the text has {} tokens, --context asks for {}", num_tokens,
                           options.context);
  }
  for (const int layer : options.layers) {
    if (layer < 0 || layer >= config.num_layers) {
      return InvalidArgument("--layers: {} is not in [0, {})", layer, config.num_layers);
    }
  }
  return OkStatus();
}

std::string_view NameOf(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}

StatusOr<DType> KvDTypeNamed(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (name == NameOf(dtype)) return dtype;
  }
  return InvalidArgument("kv_dtype \"{}\" is not f32, f16 or bf16", name);
}

}  // namespace

StatusOr<AttentionProfile> RecordProfile(Model& model, ProfilingOps& ops,
                                         std::span<const int32_t> tokens,
                                         const ProfileOptions& options) {
  const ModelConfig& config = model.config();
  GLOAM_RETURN_IF_ERROR(CheckProfileOptions(config, tokens.size(), options));
  AttentionProfile profile;
  profile.model = config.name;
  profile.num_heads = config.num_heads;
  profile.context = options.context;
  profile.num_queries = options.num_queries;
  KvPlan plan;
  plan.layout = {.dtype = DefaultKvDType(config),
                 .num_kv_heads = config.num_kv_heads,
                 .head_dim = config.head_dim};
  plan.num_blocks = BlocksFor(options.context);
  profile.kv = plan.layout;
  GLOAM_ASSIGN_OR_RETURN(const KvCachePool pool, KvCachePool::Create(ops, plan, config.num_layers));
  const ModelRunnerLimits limits = {.max_num_seqs = 1,
                                    .max_num_batched_tokens = kChunkTokens,
                                    .max_score_rows = 1,
                                    .max_model_len = options.context};
  GLOAM_ASSIGN_OR_RETURN(ModelRunner runner, ModelRunner::Create(limits, ops, model));
  runner.SetCache(pool.layers(), pool.sidecars());

  Sequence sequence;
  sequence.tokens.assign(tokens.begin(), tokens.begin() + options.context);
  sequence.table.blocks.resize(plan.num_blocks);
  std::iota(sequence.table.blocks.begin(), sequence.table.blocks.end(), 0);
  while (sequence.num_pending() > 0) {
    StepPlan step;
    // The last step is exactly the tokens whose queries are kept. It asks for logits: without, the
    // last layer would not attend.
    const int before_queries = sequence.num_pending() - options.num_queries;
    const bool is_last = before_queries <= 0;
    step.num_tokens = is_last ? options.num_queries : std::min(kChunkTokens, before_queries);
    step.num_sample_rows = is_last ? 1 : 0;
    if (is_last) ops.Begin(config.num_layers, options.num_queries);
    step.sequences.push_back(
        {.sequence = &sequence, .num_tokens = step.num_tokens, .samples = is_last});
    runner.Forward(step);
    sequence.num_computed += step.num_tokens;
  }
  for (const int layer : options.layers) {
    AttentionProfile::Layer kept;
    kept.layer = layer;
    kept.queries = ops.queries(layer);
    GLOAM_CHECK(static_cast<int64_t>(kept.queries.size()) ==
                int64_t{options.num_queries} * config.num_heads * config.head_dim);
    const auto* data = static_cast<const std::byte*>(pool.layers()[layer].data);
    kept.kv_cache.assign(data, data + plan.num_blocks * plan.layout.block_bytes());
    profile.layers.push_back(std::move(kept));
  }
  return profile;
}

Status SaveProfile(const AttentionProfile& profile, const std::filesystem::path& path) {
  nlohmann::ordered_json header = {{"format", kFormat},
                                   {"model", profile.model},
                                   {"num_heads", profile.num_heads},
                                   {"num_kv_heads", profile.kv.num_kv_heads},
                                   {"head_dim", profile.kv.head_dim},
                                   {"kv_dtype", NameOf(profile.kv.dtype)},
                                   {"context", profile.context},
                                   {"num_queries", profile.num_queries}};
  for (const auto& layer : profile.layers) header["layers"].push_back(layer.layer);
  std::ofstream file(path, std::ios::binary);
  file << header.dump() << '\n';
  for (const auto& layer : profile.layers) {
    file.write(reinterpret_cast<const char*>(layer.queries.data()),
               static_cast<std::streamsize>(layer.queries.size() * sizeof(float)));
    file.write(reinterpret_cast<const char*>(layer.kv_cache.data()),
               static_cast<std::streamsize>(layer.kv_cache.size()));
  }
  file.close();
  if (!file) return Internal("cannot write {}", path.string());
  return OkStatus();
}

StatusOr<AttentionProfile> LoadProfile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string line;
  if (!file || !std::getline(file, line)) return NotFound("cannot read {}", path.string());
  const nlohmann::json header = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object() || header.value("format", nlohmann::json()) != kFormat) {
    return InvalidArgument("{}: not an attention profile", path.string());
  }
  const auto number = [&](const char* key) {
    const auto it = header.find(key);
    return it != header.end() && it->is_number_integer() ? it->get<int64_t>() : int64_t{0};
  };
  for (const char* key : {"num_heads", "num_kv_heads", "head_dim", "context", "num_queries"}) {
    if (number(key) < 1 || number(key) > (1 << 24)) {
      return InvalidArgument("{}: {} is missing or out of range", path.string(), key);
    }
  }
  AttentionProfile profile;
  profile.num_heads = static_cast<int>(number("num_heads"));
  profile.kv.num_kv_heads = static_cast<int>(number("num_kv_heads"));
  profile.kv.head_dim = static_cast<int>(number("head_dim"));
  profile.context = static_cast<int>(number("context"));
  profile.num_queries = static_cast<int>(number("num_queries"));
  if (profile.num_heads % profile.kv.num_kv_heads != 0 || profile.kv.head_dim % 16 != 0 ||
      profile.num_queries > profile.context) {
    return InvalidArgument("{}: heads, head_dim or num_queries do not fit", path.string());
  }
  const auto name = header.find("model");
  if (name != header.end() && name->is_string()) profile.model = *name;
  const auto dtype = header.find("kv_dtype");
  GLOAM_ASSIGN_OR_RETURN(
      profile.kv.dtype,
      KvDTypeNamed(dtype != header.end() && dtype->is_string() ? std::string(*dtype) : ""));
  const auto layers = header.find("layers");
  if (layers == header.end() || !layers->is_array()) {
    return InvalidArgument("{}: layers is missing", path.string());
  }
  std::error_code error;
  const auto file_bytes = static_cast<int64_t>(std::filesystem::file_size(path, error));
  const int64_t query_bytes = int64_t{profile.num_queries} * profile.num_heads *
                              profile.kv.head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t cache_bytes = profile.num_blocks() * profile.kv.block_bytes();
  const auto num_layers = static_cast<int64_t>(layers->size());
  if (error || file_bytes != static_cast<int64_t>(line.size()) + 1 +
                                 num_layers * (query_bytes + cache_bytes)) {
    return InvalidArgument("{}: the file's size does not fit its header", path.string());
  }
  for (const nlohmann::json& layer : *layers) {
    if (!layer.is_number_integer()) return InvalidArgument("{}: layers", path.string());
    AttentionProfile::Layer& read = profile.layers.emplace_back();
    read.layer = layer.get<int>();
    read.queries.resize(query_bytes / sizeof(float));
    read.kv_cache.resize(cache_bytes);
    file.read(reinterpret_cast<char*>(read.queries.data()), query_bytes);
    file.read(reinterpret_cast<char*>(read.kv_cache.data()), cache_bytes);
  }
  if (!file) return InvalidArgument("{}: the file ends early", path.string());
  return profile;
}

}  // namespace gloam
