// ReadGgufConfig and ReadGgufVocabulary: what the metadata of a GGUF file means.
#include <cmath>
#include <cstring>
#include <limits>

#include "models/config_checks.h"
#include "models/field_name.h"
#include "models/gguf_model_file.h"

namespace gloam {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Reads the keys below one architecture's prefix ("llama.", "qwen2.", ...).
class ArchitectureKeys {
 public:
  ArchitectureKeys(const Gguf& gguf, std::string_view architecture)
      : gguf_(gguf), prefix_(std::string(architecture) + ".") {}

  std::string Key(std::string_view name) const { return prefix_ + std::string(name); }
  bool Has(std::string_view name) const { return gguf_.Has(Key(name)); }

  Status Int(std::string_view name, int* value) const {
    GLOAM_ASSIGN_OR_RETURN(const int64_t number, gguf_.GetInt(Key(name), 0, kMaxInt));
    *value = static_cast<int>(number);
    return OkStatus();
  }
  // Leaves `value` where the key is absent.
  Status OptionalInt(std::string_view name, int* value) const {
    return Has(name) ? Int(name, value) : OkStatus();
  }
  Status OptionalFloat(std::string_view name, float* value) const {
    GLOAM_ASSIGN_OR_RETURN(*value, gguf_.GetFloatOr(Key(name), *value));
    return OkStatus();
  }

 private:
  const Gguf& gguf_;
  std::string prefix_;
};

const GgufTensor* FindTensor(const Gguf& gguf, std::string_view name) {
  for (const GgufTensor& tensor : gguf.tensors()) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

Status ReadShape(const Gguf& gguf, const ArchitectureKeys& keys, ModelConfig* config) {
  GLOAM_RETURN_IF_ERROR(keys.Int("block_count", &config->num_layers));
  GLOAM_RETURN_IF_ERROR(keys.Int("embedding_length", &config->hidden_size));
  GLOAM_RETURN_IF_ERROR(keys.Int("feed_forward_length", &config->intermediate_size));
  GLOAM_RETURN_IF_ERROR(keys.Int("context_length", &config->max_position));
  GLOAM_RETURN_IF_ERROR(keys.Int("attention.head_count", &config->num_heads));
  config->num_kv_heads = config->num_heads;
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("attention.head_count_kv", &config->num_kv_heads));
  if (keys.Has("attention.key_length")) {
    GLOAM_RETURN_IF_ERROR(keys.Int("attention.key_length", &config->head_dim));
  } else if (config->num_heads > 0) {
    if (config->hidden_size % config->num_heads != 0) {
      return gguf.KeyError(keys.Key("attention.head_count"),
                           fmt::format("is {}; it must divide {} ({})", config->num_heads,
                                       keys.Key("embedding_length"), config->hidden_size));
    }
    config->head_dim = config->hidden_size / config->num_heads;
  }
  int value_dim = config->head_dim;
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("attention.value_length", &value_dim));
  if (value_dim != config->head_dim) {
    return Unimplemented("{}: key {} ({}) differs from the keys' head size ({})", gguf.file(),
                         QuoteName(keys.Key("attention.value_length")), value_dim,
                         config->head_dim);
  }
  int num_experts = 0;
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("expert_count", &num_experts));
  if (num_experts > 0) {
    return Unimplemented("{}: key {} is {}: mixture-of-experts models are not supported",
                         gguf.file(), QuoteName(keys.Key("expert_count")), num_experts);
  }
  GLOAM_ASSIGN_OR_RETURN(config->rms_norm_eps,
                         gguf.GetFloat(keys.Key("attention.layer_norm_rms_epsilon")));
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("attention.sliding_window", &config->sliding_window));
  if (config->sliding_window >= config->max_position) config->sliding_window = 0;
  return OkStatus();
}

// rope_freqs.weight: Llama 3's scaling, worked out by the converter into one divisor a channel.
Status ReadFreqFactors(const Gguf& gguf, ModelConfig* config) {
  const GgufTensor* tensor = FindTensor(gguf, "rope_freqs.weight");
  if (tensor == nullptr) return OkStatus();
  const std::vector<int64_t> expected = {config->rotary_dim / 2};
  if (tensor->type != WeightType::kF32 || tensor->shape != expected) {
    return InvalidArgument("{}: tensor 'rope_freqs.weight' must be F32 of {} elements (at byte {})",
                           gguf.file(), expected[0], tensor->offset);
  }
  std::vector<float>& factors = config->rope_scaling.freq_factors;
  factors.resize(expected[0]);
  if (factors.empty()) return OkStatus();
  std::memcpy(factors.data(), tensor->data.data(), tensor->data.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    if (!std::isfinite(factors[i]) || factors[i] <= 0) {
      return InvalidArgument(
          "{}: tensor 'rope_freqs.weight' has {} at index {}; it must be finite "
          "and above 0 (at byte {})",
          gguf.file(), factors[i], i, tensor->offset + i * sizeof(float));
    }
  }
  return OkStatus();
}

Status ReadRope(const Gguf& gguf, const ArchitectureKeys& keys, ModelConfig* config) {
  GLOAM_RETURN_IF_ERROR(keys.OptionalFloat("rope.freq_base", &config->rope_theta));
  config->rotary_dim = config->head_dim;
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("rope.dimension_count", &config->rotary_dim));

  // Files from before "rope.scaling.*" carry only the linear factor.
  RopeScaling& scaling = config->rope_scaling;
  GLOAM_RETURN_IF_ERROR(keys.OptionalFloat("rope.scale_linear", &scaling.factor));
  GLOAM_RETURN_IF_ERROR(keys.OptionalFloat("rope.scaling.factor", &scaling.factor));
  GLOAM_ASSIGN_OR_RETURN(const std::string_view type,
                         gguf.GetStringOr(keys.Key("rope.scaling.type"), "linear"));
  if (type == "none") {
    scaling.factor = 1.0f;
  } else if (type != "linear") {
    return Unimplemented("{}: key {} is {}; 'none' and 'linear' are supported", gguf.file(),
                         QuoteName(keys.Key("rope.scaling.type")), QuoteName(type));
  }
  if (scaling.factor != 1.0f) scaling.type = RopeScaling::Type::kLinear;
  return ReadFreqFactors(gguf, config);
}

// The vocabulary's size is the embedding's; what else states it must agree.
Status ReadVocabSize(const Gguf& gguf, const ArchitectureKeys& keys, ModelConfig* config) {
  const GgufTensor* embedding = FindTensor(gguf, "token_embd.weight");
  if (embedding == nullptr) {
    return InvalidArgument("{}: tensor 'token_embd.weight' is missing", gguf.file());
  }
  const int64_t rows = embedding->shape.front();
  if (rows > kMaxInt) {
    return InvalidArgument("{}: tensor 'token_embd.weight' has {} rows; at most {} are possible",
                           gguf.file(), rows, kMaxInt);
  }
  config->vocab_size = static_cast<int>(rows);
  int stated = config->vocab_size;
  GLOAM_RETURN_IF_ERROR(keys.OptionalInt("vocab_size", &stated));
  if (stated != config->vocab_size) {
    return gguf.KeyError(keys.Key("vocab_size"),
                         fmt::format("is {}, and 'token_embd.weight' has {} rows", stated, rows));
  }
  for (const GgufEntry& entry : gguf.entries()) {
    if (entry.key != "tokenizer.ggml.tokens") continue;
    if (entry.value.type == GgufType::kArray && entry.value.count != static_cast<uint64_t>(rows)) {
      return gguf.KeyError(entry.key, fmt::format("has {} tokens, and 'token_embd.weight' has {} "
                                                  "rows",
                                                  entry.value.count, rows));
    }
  }
  return OkStatus();
}

ConfigKeys KeysOf(const Gguf& gguf, const ArchitectureKeys& keys) {
  const auto quoted = [&keys](std::string_view name) { return "key " + QuoteName(keys.Key(name)); };
  return {
      .file = gguf.file(),
      .num_layers = quoted("block_count"),
      .hidden_size = quoted("embedding_length"),
      .intermediate_size = quoted("feed_forward_length"),
      .num_heads = quoted("attention.head_count"),
      .num_kv_heads = quoted("attention.head_count_kv"),
      .head_dim = quoted("attention.key_length"),
      .max_position = quoted("context_length"),
      .rms_norm_eps = quoted("attention.layer_norm_rms_epsilon"),
      .rope_theta = quoted("rope.freq_base"),
      .rotary_dim = quoted("rope.dimension_count"),
      .rope_factor = quoted("rope.scaling.factor"),
      .sliding_window = quoted("attention.sliding_window"),
  };
}

// A token id; -1 where the key is absent or holds the format's "none" (all ones).
StatusOr<int32_t> ReadTokenId(const Gguf& gguf, std::string_view name, int64_t num_tokens) {
  const std::string key = "tokenizer.ggml." + std::string(name);
  constexpr int64_t kNone = std::numeric_limits<uint32_t>::max();
  GLOAM_ASSIGN_OR_RETURN(const int64_t id, gguf.GetIntOr(key, -1, -1, kNone));
  if (id == kNone) return -1;
  if (id >= num_tokens) {
    return gguf.KeyError(key, fmt::format("is {}; the vocabulary has {} tokens", id, num_tokens));
  }
  return static_cast<int32_t>(id);
}

}  // namespace

StatusOr<ModelConfig> ReadGgufConfig(const Gguf& gguf) {
  ModelConfig config;
  GLOAM_ASSIGN_OR_RETURN(const std::string_view architecture,
                         gguf.GetString("general.architecture"));
  config.architecture = std::string(architecture);
  // Converters permute Q and K of the Llama family (SmolLM3 among them) into interleaved pairs.
  if (architecture == "llama" || architecture == "mistral" || architecture == "smollm3") {
    config.rope_style = RopeStyle::kInterleaved;
  } else if (architecture == "qwen2" || architecture == "qwen3") {
    config.rope_style = RopeStyle::kNeox;
  } else {
    return Unimplemented(
        "{}: key 'general.architecture' is {}; llama, mistral, qwen2, qwen3 and "
        "smollm3 are supported",
        gguf.file(), QuoteName(architecture));
  }
  GLOAM_ASSIGN_OR_RETURN(const std::string_view name, gguf.GetStringOr("general.name", ""));
  config.name = std::string(name);

  const ArchitectureKeys keys(gguf, architecture);
  GLOAM_RETURN_IF_ERROR(ReadShape(gguf, keys, &config));
  GLOAM_RETURN_IF_ERROR(ReadRope(gguf, keys, &config));
  GLOAM_RETURN_IF_ERROR(CheckConfig(config, KeysOf(gguf, keys)));
  GLOAM_RETURN_IF_ERROR(ReadVocabSize(gguf, keys, &config));
  config.qk_norm = architecture == "qwen3";
  config.tie_embeddings = FindTensor(gguf, "output.weight") == nullptr;
  config.attention_bias =
      architecture == "qwen2" || FindTensor(gguf, "blk.0.attn_q.bias") != nullptr;
  if (architecture == "smollm3") config.layer_uses_rope = SmolLm3RopeLayers(config.num_layers);
  return config;
}

StatusOr<GgufVocabulary> ReadGgufVocabulary(const Gguf& gguf) {
  GgufVocabulary vocabulary;
  GLOAM_ASSIGN_OR_RETURN(const std::string_view model, gguf.GetString("tokenizer.ggml.model"));
  vocabulary.model = std::string(model);
  GLOAM_ASSIGN_OR_RETURN(const std::string_view pre,
                         gguf.GetStringOr("tokenizer.ggml.pre", "default"));
  vocabulary.pre = std::string(pre);
  GLOAM_ASSIGN_OR_RETURN(vocabulary.tokens, gguf.GetStrings("tokenizer.ggml.tokens"));
  const int64_t num_tokens = static_cast<int64_t>(vocabulary.tokens.size());

  if (gguf.Has("tokenizer.ggml.scores")) {
    GLOAM_ASSIGN_OR_RETURN(vocabulary.scores, gguf.GetFloats("tokenizer.ggml.scores"));
    if (vocabulary.scores.size() != vocabulary.tokens.size()) {
      return gguf.KeyError(
          "tokenizer.ggml.scores",
          fmt::format("has {} elements for {} tokens", vocabulary.scores.size(), num_tokens));
    }
  }
  if (gguf.Has("tokenizer.ggml.token_type")) {
    GLOAM_ASSIGN_OR_RETURN(const std::vector<int64_t> types,
                           gguf.GetInts("tokenizer.ggml.token_type", 0, 6));
    if (types.size() != vocabulary.tokens.size()) {
      return gguf.KeyError("tokenizer.ggml.token_type",
                           fmt::format("has {} elements for {} tokens", types.size(), num_tokens));
    }
    vocabulary.types.assign(types.begin(), types.end());
  }
  if (gguf.Has("tokenizer.ggml.merges")) {
    GLOAM_ASSIGN_OR_RETURN(vocabulary.merges, gguf.GetStrings("tokenizer.ggml.merges"));
  }
  GLOAM_ASSIGN_OR_RETURN(vocabulary.bos_id, ReadTokenId(gguf, "bos_token_id", num_tokens));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.eos_id, ReadTokenId(gguf, "eos_token_id", num_tokens));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.eot_id, ReadTokenId(gguf, "eot_token_id", num_tokens));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.unk_id, ReadTokenId(gguf, "unknown_token_id", num_tokens));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.pad_id, ReadTokenId(gguf, "padding_token_id", num_tokens));

  // Where a file does not say, SentencePiece and Llama 3 prompts start with BOS, others do not.
  const bool default_bos = model == "llama" || pre == "llama-bpe" || pre == "llama3";
  GLOAM_ASSIGN_OR_RETURN(vocabulary.add_bos,
                         gguf.GetBoolOr("tokenizer.ggml.add_bos_token", default_bos));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.add_eos, gguf.GetBoolOr("tokenizer.ggml.add_eos_token", false));
  GLOAM_ASSIGN_OR_RETURN(vocabulary.add_space_prefix,
                         gguf.GetBoolOr("tokenizer.ggml.add_space_prefix", model == "llama"));
  return vocabulary;
}

}  // namespace gloam
