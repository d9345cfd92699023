#include "models/hf_config.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "models/checked_json.h"
#include "models/config_checks.h"
#include "models/field_name.h"
#include "models/mapped_file.h"

namespace gloam {
namespace {

using nlohmann::json;

Status CheckFamily(const JsonFields& fields, ModelConfig* config) {
  std::string& family = config->architecture;
  GLOAM_RETURN_IF_ERROR(fields.String("model_type", &family));
  if (family != "llama" && family != "mistral" && family != "qwen2" && family != "qwen3" &&
      family != "smollm3") {
    return Unimplemented(
        "{}: model_type is {}; llama, mistral, qwen2, qwen3 and smollm3 are "
        "supported",
        fields.file(), QuoteName(family));
  }
  if (fields.Has("quantization_config")) {
    return Unimplemented(
        "{}: quantization_config: quantised safetensors are not supported (F32, "
        "F16 and BF16 are; GGUF files may be quantised)",
        fields.file());
  }
  std::string activation = "silu";
  GLOAM_RETURN_IF_ERROR(fields.OptionalString("hidden_act", &activation));
  if (activation != "silu") {
    return Unimplemented("{}: hidden_act is {}; 'silu' is supported", fields.file(),
                         QuoteName(activation));
  }
  bool mlp_bias = false;
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("mlp_bias", &mlp_bias));
  if (mlp_bias) return Unimplemented("{}: mlp_bias is not supported", fields.file());
  return OkStatus();
}

Status ReadShape(const JsonFields& fields, ModelConfig* config) {
  GLOAM_RETURN_IF_ERROR(fields.Int("num_hidden_layers", &config->num_layers));
  GLOAM_RETURN_IF_ERROR(fields.Int("hidden_size", &config->hidden_size));
  GLOAM_RETURN_IF_ERROR(fields.Int("intermediate_size", &config->intermediate_size));
  GLOAM_RETURN_IF_ERROR(fields.Int("vocab_size", &config->vocab_size));
  if (config->vocab_size == 0) return fields.Error("vocab_size", "is 0");
  GLOAM_RETURN_IF_ERROR(fields.Int("max_position_embeddings", &config->max_position));
  GLOAM_RETURN_IF_ERROR(fields.Int("num_attention_heads", &config->num_heads));
  config->num_kv_heads = config->num_heads;
  GLOAM_RETURN_IF_ERROR(fields.OptionalInt("num_key_value_heads", &config->num_kv_heads));
  if (fields.Has("head_dim")) {
    GLOAM_RETURN_IF_ERROR(fields.Int("head_dim", &config->head_dim));
  } else if (config->num_heads > 0) {
    if (config->hidden_size % config->num_heads != 0) {
      return fields.Error("num_attention_heads",
                          fmt::format("is {}; it must divide hidden_size ({})", config->num_heads,
                                      config->hidden_size));
    }
    config->head_dim = config->hidden_size / config->num_heads;
  }
  if (!fields.Has("rms_norm_eps")) return fields.Error("rms_norm_eps", "is missing");
  return fields.OptionalFloat("rms_norm_eps", &config->rms_norm_eps);
}

// The body of rope_scaling or of rope_parameters: the kind of scaling and its numbers.
Status ReadScaling(const JsonFields& fields, RopeScaling* scaling) {
  std::string type = "default";
  GLOAM_RETURN_IF_ERROR(fields.OptionalString("type", &type));  // the older name
  GLOAM_RETURN_IF_ERROR(fields.OptionalString("rope_type", &type));
  if (type == "default") return OkStatus();
  if (type != "linear" && type != "llama3") {
    return Unimplemented("{}: {} is {}; 'default', 'linear' and 'llama3' are supported",
                         fields.file(), fields.NameOf("rope_type"), QuoteName(type));
  }
  if (!fields.Has("factor")) return fields.Error("factor", "is missing");
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat("factor", &scaling->factor));
  if (type == "linear") {
    scaling->type = RopeScaling::Type::kLinear;
    return OkStatus();
  }
  scaling->type = RopeScaling::Type::kLlama3;
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat("low_freq_factor", &scaling->low_freq_factor));
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat("high_freq_factor", &scaling->high_freq_factor));
  GLOAM_RETURN_IF_ERROR(
      fields.Int("original_max_position_embeddings", &scaling->original_max_position));
  if (scaling->low_freq_factor <= 0) return fields.Error("low_freq_factor", "must be above 0");
  if (scaling->high_freq_factor <= scaling->low_freq_factor) {
    return fields.Error("high_freq_factor", "must be above low_freq_factor");
  }
  if (scaling->original_max_position == 0) {
    return fields.Error("original_max_position_embeddings", "is 0");
  }
  return OkStatus();
}

Status ReadRope(const JsonFields& fields, ModelConfig* config) {
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat("rope_theta", &config->rope_theta));
  float rotary_share = 1.0f;
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat("partial_rotary_factor", &rotary_share));
  for (const char* name : {"rope_scaling", "rope_parameters"}) {  // the latter since transformers 5
    const json* object = fields.Find(name);
    if (object == nullptr) continue;
    if (!object->is_object()) return fields.Error(name, "must be an object");
    const JsonFields rope(*object, fields.file(), std::string(name) + ".");
    for (const auto& [key, value] : object->items()) {
      if (!value.is_object()) continue;
      return Unimplemented("{}: {}: parameters per kind of layer are not supported", fields.file(),
                           rope.NameOf(key));
    }
    GLOAM_RETURN_IF_ERROR(rope.OptionalFloat("rope_theta", &config->rope_theta));
    GLOAM_RETURN_IF_ERROR(rope.OptionalFloat("partial_rotary_factor", &rotary_share));
    GLOAM_RETURN_IF_ERROR(ReadScaling(rope, &config->rope_scaling));
  }
  if (!(rotary_share > 0 && rotary_share <= 1)) {
    return fields.Error("partial_rotary_factor", "must be in (0, 1]");
  }
  config->rotary_dim = static_cast<int>(std::lround(config->head_dim * rotary_share));
  config->rope_style = RopeStyle::kNeox;
  return OkStatus();
}

// One window for every layer, or none: a model that mixes them is refused.
Status ReadSlidingWindow(const JsonFields& fields, ModelConfig* config) {
  if (config->architecture == "llama") return OkStatus();
  int window = 0, first_layer = 0;
  bool used = config->architecture == "mistral";
  GLOAM_RETURN_IF_ERROR(fields.OptionalInt("sliding_window", &window));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("use_sliding_window", &used));
  GLOAM_RETURN_IF_ERROR(fields.OptionalInt("max_window_layers", &first_layer));
  int num_windowed = used && window > 0 ? std::max(config->num_layers - first_layer, 0) : 0;
  if (const json* types = fields.Find("layer_types")) {
    if (!types->is_array() || types->size() != static_cast<size_t>(config->num_layers)) {
      return fields.Error("layer_types",
                          fmt::format("must be an array of {} names", config->num_layers));
    }
    num_windowed = static_cast<int>(std::count(types->begin(), types->end(), "sliding_attention"));
    if (num_windowed > 0 && window == 0) {
      return fields.Error("layer_types", "names sliding_attention without a sliding_window");
    }
  }
  if (num_windowed == 0 || window >= config->max_position) return OkStatus();
  if (num_windowed < config->num_layers) {
    return Unimplemented("{}: {} of {} layers have a sliding_window: all or none is supported",
                         fields.file(), num_windowed, config->num_layers);
  }
  config->sliding_window = window;
  return OkStatus();
}

Status ReadRopeLayers(const JsonFields& fields, ModelConfig* config) {
  if (config->architecture != "smollm3") return OkStatus();
  config->layer_uses_rope = SmolLm3RopeLayers(config->num_layers);
  std::vector<int32_t> uses_rope;
  GLOAM_RETURN_IF_ERROR(fields.OptionalInts("no_rope_layers", &uses_rope));  // 1: with rope
  if (uses_rope.empty()) return OkStatus();
  if (uses_rope.size() != config->layer_uses_rope.size()) {
    return fields.Error("no_rope_layers", fmt::format("has {} elements for {} layers",
                                                      uses_rope.size(), config->num_layers));
  }
  for (size_t i = 0; i < uses_rope.size(); ++i) config->layer_uses_rope[i] = uses_rope[i] != 0;
  return OkStatus();
}

ConfigKeys KeysOf(const std::string& file) {
  return {
      .file = file,
      .num_layers = "num_hidden_layers",
      .hidden_size = "hidden_size",
      .intermediate_size = "intermediate_size",
      .num_heads = "num_attention_heads",
      .num_kv_heads = "num_key_value_heads",
      .head_dim = "head_dim",
      .max_position = "max_position_embeddings",
      .rms_norm_eps = "rms_norm_eps",
      .rope_theta = "rope_theta",
      .rotary_dim = "partial_rotary_factor x head_dim",
      .rope_factor = "rope_scaling.factor",
      .sliding_window = "sliding_window",
  };
}

Status ReadOptional(const JsonFields& fields, const char* field, float min, float max,
                    std::optional<float>* value) {
  if (!fields.Has(field)) return OkStatus();
  float number = 0;
  GLOAM_RETURN_IF_ERROR(fields.OptionalFloat(field, &number));
  if (number < min || number > max) {
    return fields.Error(field, fmt::format("is {}; it must be in [{}, {}]", number, min, max));
  }
  *value = number;
  return OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ParseHfConfig(const json& json, const std::string& file) {
  const JsonFields fields(json, file);
  ModelConfig config;
  GLOAM_RETURN_IF_ERROR(CheckFamily(fields, &config));
  GLOAM_RETURN_IF_ERROR(fields.OptionalString("_name_or_path", &config.name));
  GLOAM_RETURN_IF_ERROR(ReadShape(fields, &config));
  GLOAM_RETURN_IF_ERROR(ReadRope(fields, &config));
  GLOAM_RETURN_IF_ERROR(CheckConfig(config, KeysOf(file)));
  GLOAM_RETURN_IF_ERROR(ReadSlidingWindow(fields, &config));
  GLOAM_RETURN_IF_ERROR(ReadRopeLayers(fields, &config));
  config.qk_norm = config.architecture == "qwen3";
  config.tie_embeddings = config.architecture == "smollm3";  // the family's default
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("tie_word_embeddings", &config.tie_embeddings));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("attention_bias", &config.attention_bias));
  if (config.architecture == "qwen2") config.attention_bias = true;
  return config;
}

StatusOr<GenerationDefaults> ReadGenerationDefaults(const std::filesystem::path& folder,
                                                    const json& config, int vocab_size) {
  GenerationDefaults defaults;
  const std::filesystem::path path = folder / "generation_config.json";
  const JsonFields config_fields(config, (folder / "config.json").string());
  GLOAM_RETURN_IF_ERROR(config_fields.OptionalInts("eos_token_id", &defaults.eos_token_ids));
  if (FileExists(path)) {
    GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(path));
    const JsonFields fields(document, path.string());
    constexpr float kAny = 1e6f;
    GLOAM_RETURN_IF_ERROR(ReadOptional(fields, "temperature", 0, kAny, &defaults.temperature));
    GLOAM_RETURN_IF_ERROR(ReadOptional(fields, "top_p", 0, 1, &defaults.top_p));
    GLOAM_RETURN_IF_ERROR(ReadOptional(fields, "min_p", 0, 1, &defaults.min_p));
    GLOAM_RETURN_IF_ERROR(
        ReadOptional(fields, "repetition_penalty", 1e-6f, kAny, &defaults.repetition_penalty));
    if (fields.Has("top_k")) {
      int top_k = 0;
      GLOAM_RETURN_IF_ERROR(fields.OptionalInt("top_k", &top_k));
      defaults.top_k = top_k;
    }
    GLOAM_RETURN_IF_ERROR(fields.OptionalInts("eos_token_id", &defaults.eos_token_ids));
  }
  for (const int32_t id : defaults.eos_token_ids) {
    if (id >= vocab_size) {
      return config_fields.Error(
          "eos_token_id", fmt::format("is {}; the vocabulary has {} tokens", id, vocab_size));
    }
  }
  return defaults;
}

StatusOr<std::string> ReadChatTemplate(const std::filesystem::path& folder) {
  const std::filesystem::path jinja = folder / "chat_template.jinja";
  if (FileExists(jinja)) {
    GLOAM_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(jinja));
    return std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  }
  const std::filesystem::path path = folder / "tokenizer_config.json";
  if (!FileExists(path)) return std::string();
  GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(path));
  const JsonFields fields(document, path.string());
  const json* found = fields.Find("chat_template");
  if (found == nullptr) return std::string();
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_array()) return fields.Error("chat_template", "must be a string or a list");
  for (const json& item : *found) {
    if (!item.is_object()) return fields.Error("chat_template", "must list objects");
    const JsonFields named(item, path.string(), "chat_template[].");
    std::string name, source;
    GLOAM_RETURN_IF_ERROR(named.String("name", &name));
    GLOAM_RETURN_IF_ERROR(named.String("template", &source));
    if (name == "default") return source;
  }
  return std::string();
}

}  // namespace gloam
