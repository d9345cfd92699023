#include "models/config_checks.h"

#include <cmath>
#include <string_view>
#include <unordered_map>

#include "fmt/ranges.h"
#include "models/field_name.h"

namespace gloam {
namespace {

// Far above any model, low enough that products of two fit an int64 and of sizes an allocation.
constexpr int kMaxLayers = 4096;
constexpr int kMaxWidth = 1 << 20;
constexpr int kMaxHeads = 4096;
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxContext = 1 << 28;

Status CheckRange(const ConfigKeys& keys, const std::string& key, int64_t value, int64_t min,
                  int64_t max) {
  if (value >= min && value <= max) return OkStatus();
  return InvalidArgument("{}: {} is {}; it must be in [{}, {}]", keys.file, key, value, min, max);
}

Status CheckPositive(const ConfigKeys& keys, const std::string& key, float value) {
  if (std::isfinite(value) && value > 0) return OkStatus();
  return InvalidArgument("{}: {} is {}; it must be finite and above 0", keys.file, key, value);
}

Status CheckHeads(const ModelConfig& config, const ConfigKeys& keys) {
  if (config.num_heads % config.num_kv_heads != 0) {
    return InvalidArgument("{}: {} ({}) must be a multiple of {} ({})", keys.file, keys.num_heads,
                           config.num_heads, keys.num_kv_heads, config.num_kv_heads);
  }
  if (config.head_dim % 2 != 0) {
    return InvalidArgument("{}: {} is {}; it must be even", keys.file, keys.head_dim,
                           config.head_dim);
  }
  if (config.rotary_dim % 2 != 0 || config.rotary_dim > config.head_dim) {
    return InvalidArgument("{}: {} is {}; it must be even and at most the head's {} channels",
                           keys.file, keys.rotary_dim, config.rotary_dim, config.head_dim);
  }
  return OkStatus();
}

struct Expected {
  std::string name;
  std::vector<int64_t> shape;
};

std::vector<Expected> ModelTensors(const ModelConfig& c) {
  std::vector<Expected> expected = {{"token_embd.weight", {c.vocab_size, c.hidden_size}},
                                    {"output_norm.weight", {c.hidden_size}}};
  if (!c.tie_embeddings) expected.push_back({"output.weight", {c.vocab_size, c.hidden_size}});
  return expected;
}

std::vector<Expected> LayerTensors(const ModelConfig& c, int layer) {
  const std::string prefix = fmt::format("blk.{}.", layer);
  const int64_t q = int64_t{c.num_heads} * c.head_dim;
  const int64_t kv = int64_t{c.num_kv_heads} * c.head_dim;
  std::vector<Expected> expected = {
      {prefix + "attn_norm.weight", {c.hidden_size}},
      {prefix + "attn_q.weight", {q, c.hidden_size}},
      {prefix + "attn_k.weight", {kv, c.hidden_size}},
      {prefix + "attn_v.weight", {kv, c.hidden_size}},
      {prefix + "attn_output.weight", {c.hidden_size, q}},
      {prefix + "ffn_norm.weight", {c.hidden_size}},
      {prefix + "ffn_gate.weight", {c.intermediate_size, c.hidden_size}},
      {prefix + "ffn_up.weight", {c.intermediate_size, c.hidden_size}},
      {prefix + "ffn_down.weight", {c.hidden_size, c.intermediate_size}},
  };
  if (c.attention_bias) {
    expected.push_back({prefix + "attn_q.bias", {q}});
    expected.push_back({prefix + "attn_k.bias", {kv}});
    expected.push_back({prefix + "attn_v.bias", {kv}});
  }
  if (c.qk_norm) {
    expected.push_back({prefix + "attn_q_norm.weight", {c.head_dim}});
    expected.push_back({prefix + "attn_k_norm.weight", {c.head_dim}});
  }
  return expected;
}

bool IsFloat(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kF16 || type == WeightType::kBF16;
}

// Takes what it finds out of `left`.
Status CheckAgainst(const std::vector<Expected>& expected, const std::string& file,
                    std::unordered_map<std::string_view, const TensorInfo*>* left) {
  for (const Expected& want : expected) {
    const auto found = left->find(want.name);
    if (found == left->end()) {
      return InvalidArgument("{}: tensor {} is missing", file, QuoteName(want.name));
    }
    const TensorInfo& tensor = *found->second;
    if (tensor.shape != want.shape) {
      return InvalidArgument("{}: tensor {} has the shape [{}]; the configuration asks for [{}]",
                             file, QuoteName(want.name), fmt::join(tensor.shape, ", "),
                             fmt::join(want.shape, ", "));
    }
    if (want.shape.size() == 1 && !IsFloat(tensor.data.type)) {
      return Unimplemented("{}: tensor {} is of type {}; vectors must be F32, F16 or BF16", file,
                           QuoteName(want.name), InfoOf(tensor.data.type).name);
    }
    left->erase(found);
  }
  return OkStatus();
}

}  // namespace

Status CheckConfig(const ModelConfig& config, const ConfigKeys& keys) {
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.num_layers, config.num_layers, 1, kMaxLayers));
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.hidden_size, config.hidden_size, 1, kMaxWidth));
  GLOAM_RETURN_IF_ERROR(
      CheckRange(keys, keys.intermediate_size, config.intermediate_size, 1, kMaxWidth));
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.num_heads, config.num_heads, 1, kMaxHeads));
  GLOAM_RETURN_IF_ERROR(
      CheckRange(keys, keys.num_kv_heads, config.num_kv_heads, 1, config.num_heads));
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.head_dim, config.head_dim, 2, kMaxHeadDim));
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.rotary_dim, config.rotary_dim, 2, kMaxHeadDim));
  GLOAM_RETURN_IF_ERROR(CheckRange(keys, keys.max_position, config.max_position, 1, kMaxContext));
  GLOAM_RETURN_IF_ERROR(
      CheckRange(keys, keys.sliding_window, config.sliding_window, 0, kMaxContext));
  GLOAM_RETURN_IF_ERROR(CheckPositive(keys, keys.rms_norm_eps, config.rms_norm_eps));
  GLOAM_RETURN_IF_ERROR(CheckPositive(keys, keys.rope_theta, config.rope_theta));
  GLOAM_RETURN_IF_ERROR(CheckPositive(keys, keys.rope_factor, config.rope_scaling.factor));
  return CheckHeads(config, keys);
}

Status CheckTensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                    const std::string& file) {
  std::unordered_map<std::string_view, const TensorInfo*> left;
  for (const TensorInfo& tensor : tensors) left.emplace(tensor.name, &tensor);
  GLOAM_RETURN_IF_ERROR(CheckAgainst(ModelTensors(config), file, &left));
  for (int layer = 0; layer < config.num_layers; ++layer) {
    GLOAM_RETURN_IF_ERROR(CheckAgainst(LayerTensors(config, layer), file, &left));
  }
  for (const TensorInfo& tensor : tensors) {
    if (!left.contains(tensor.name)) continue;
    return Unimplemented("{}: tensor {} is not one that a {} model of {} layers uses here", file,
                         QuoteName(tensor.name), config.architecture, config.num_layers);
  }
  return OkStatus();
}

std::vector<bool> SmolLm3RopeLayers(int num_layers) {
  std::vector<bool> uses_rope(num_layers);
  for (int layer = 0; layer < num_layers; ++layer) uses_rope[layer] = (layer + 1) % 4 != 0;
  return uses_rope;
}

}  // namespace gloam
