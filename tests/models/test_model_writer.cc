#include "tests/models/test_model_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "base/check.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "nlohmann/json.hpp"

namespace gloam::test {

const std::string_view kTinyChatTemplate =
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uint32_t kInt32Type = 5;
constexpr uint32_t kFloat32Type = 6;
constexpr uint32_t kStringType = 8;
constexpr uint32_t kArrayType = 9;
constexpr size_t kAlignment = 32;
constexpr float kLlama3Factor = 8.0f, kLlama3Low = 1.0f, kLlama3High = 4.0f;
constexpr int kLlama3Original = 64;
constexpr float kRopeTheta = 10000.0f;

uint16_t HalfBits(float value) {  // normal numbers and zero, rounded to nearest
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  GLOAM_CHECK(exponent < 31);
  const uint32_t half = (static_cast<uint32_t>(exponent) << 10) | ((bits >> 13) & 0x3ff);
  return static_cast<uint16_t>(sign | (half + ((bits >> 12) & 1)));
}

std::string EncodeF32(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

std::string EncodeF16(const std::vector<float>& values) {
  ByteWriter out;
  for (const float value : values) out.Add(HalfBits(value));
  return out.bytes();
}

std::string EncodeBF16(const std::vector<float>& values) {  // truncated
  ByteWriter out;
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    out.Add(static_cast<uint16_t>(bits >> 16));
  }
  return out.bytes();
}

// Blocks of 32: a half-precision scale, then 32 signed bytes. The scale is a power of two.
std::string EncodeQ8(const std::vector<float>& values) {
  ByteWriter out;
  for (size_t begin = 0; begin < values.size(); begin += 32) {
    float largest = 1e-4f;
    for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(values[begin + i]));
    const float scale = std::exp2(std::ceil(std::log2(largest / 127.0f)));
    out.Add(HalfBits(scale));
    for (size_t i = 0; i < 32; ++i) {
      out.Add(static_cast<int8_t>(std::lround(values[begin + i] / scale)));
    }
  }
  return out.bytes();
}

std::string EncodeGguf(uint32_t ggml_type, const std::vector<float>& values) {
  switch (ggml_type) {
    case 0:
      return EncodeF32(values);
    case 1:
      return EncodeF16(values);
    case 8:
      return EncodeQ8(values);
    case 30:
      return EncodeBF16(values);
    default:
      GLOAM_CHECK(!"TinyModel::ggml_type must be 0, 1, 8 or 30");
      return "";
  }
}

std::string EncodeHf(const std::string& dtype, const std::vector<float>& values) {
  if (dtype == "F32") return EncodeF32(values);
  if (dtype == "F16") return EncodeF16(values);
  GLOAM_CHECK(dtype == "BF16");
  return EncodeBF16(values);
}

// ---- vocabulary -----------------------------------------------------------------------------

std::string Utf8(uint32_t code) {  // up to U+07FF
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
}

// GPT-2's map of bytes to printable characters.
std::string ByteToken(int byte) {
  const auto printable = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  };
  if (printable(byte)) return Utf8(byte);
  int shifted = 256;
  for (int b = 0; b < byte; ++b) shifted += printable(b) ? 0 : 1;
  return Utf8(shifted);
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;  // GGUF's: 1 normal, 3 control, 5 unused
  std::vector<std::pair<std::string, std::string>> merges;
};

Vocabulary TinyVocabulary() {
  const std::string space = ByteToken(' ');
  Vocabulary v;
  v.merges = {{"t", "h"}, {"th", "e"},  {space, "the"}, {"i", "n"}, {"e", "r"},
              {"a", "n"}, {space, "a"}, {"o", "n"},     {"l", "l"}, {"h", "e"}};
  for (int byte = 0; byte < 256; ++byte) v.tokens.push_back(ByteToken(byte));
  for (const auto& [left, right] : v.merges) v.tokens.push_back(left + right);
  v.types.assign(v.tokens.size(), 1);
  while (v.tokens.size() < kTinyVocabSize - 3) {
    v.tokens.push_back(fmt::format("<|unused_{}|>", v.tokens.size()));
    v.types.push_back(5);
  }
  for (const char* special : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    v.tokens.push_back(special);
    v.types.push_back(3);
  }
  GLOAM_CHECK(v.tokens.size() == kTinyVocabSize);
  return v;
}

// ---- weights --------------------------------------------------------------------------------

struct NamedTensor {
  std::string hf_name, gguf_name;
  std::vector<int64_t> shape;
  std::vector<float> values;
  int permuted_heads = 0;  // Q and K: how many heads their rows are
};

class WeightMaker {
 public:
  explicit WeightMaker(const TinyModel& model) : model_(model), random_(model.seed) {}

  std::vector<NamedTensor> Make() {
    const int64_t hidden = model_.hidden_size, ffn = model_.intermediate_size;
    const int64_t q = int64_t{model_.num_heads} * model_.head_dim;
    const int64_t kv = int64_t{model_.num_kv_heads} * model_.head_dim;
    Matrix("model.embed_tokens.weight", "token_embd.weight", kTinyVocabSize, hidden);
    Norm("model.norm.weight", "output_norm.weight", hidden);
    if (!model_.tie_embeddings) Matrix("lm_head.weight", "output.weight", kTinyVocabSize, hidden);
    for (int i = 0; i < model_.num_layers; ++i) {
      const std::string hf = fmt::format("model.layers.{}.", i);
      const std::string gguf = fmt::format("blk.{}.", i);
      Norm(hf + "input_layernorm.weight", gguf + "attn_norm.weight", hidden);
      Matrix(hf + "self_attn.q_proj.weight", gguf + "attn_q.weight", q, hidden, model_.num_heads);
      Matrix(hf + "self_attn.k_proj.weight", gguf + "attn_k.weight", kv, hidden,
             model_.num_kv_heads);
      Matrix(hf + "self_attn.v_proj.weight", gguf + "attn_v.weight", kv, hidden);
      Matrix(hf + "self_attn.o_proj.weight", gguf + "attn_output.weight", hidden, q);
      if (model_.architecture == "qwen2") {
        Bias(hf + "self_attn.q_proj.bias", gguf + "attn_q.bias", q);
        Bias(hf + "self_attn.k_proj.bias", gguf + "attn_k.bias", kv);
        Bias(hf + "self_attn.v_proj.bias", gguf + "attn_v.bias", kv);
      }
      if (model_.architecture == "qwen3") {
        Norm(hf + "self_attn.q_norm.weight", gguf + "attn_q_norm.weight", model_.head_dim);
        Norm(hf + "self_attn.k_norm.weight", gguf + "attn_k_norm.weight", model_.head_dim);
      }
      Norm(hf + "post_attention_layernorm.weight", gguf + "ffn_norm.weight", hidden);
      Matrix(hf + "mlp.gate_proj.weight", gguf + "ffn_gate.weight", ffn, hidden);
      Matrix(hf + "mlp.up_proj.weight", gguf + "ffn_up.weight", ffn, hidden);
      Matrix(hf + "mlp.down_proj.weight", gguf + "ffn_down.weight", hidden, ffn);
    }
    return std::move(tensors_);
  }

 private:
  float Uniform() { return static_cast<float>(random_() / 2147483648.0 - 1.0); }  // [-1, 1)

  void Matrix(std::string hf, std::string gguf, int64_t rows, int64_t cols, int heads = 0) {
    // Keeps activations near 1 from layer to layer.
    const float scale = std::sqrt(3.0f / static_cast<float>(cols));
    std::vector<float> values(rows * cols);
    for (float& value : values) value = scale * Uniform();
    tensors_.push_back({std::move(hf), std::move(gguf), {rows, cols}, std::move(values), heads});
  }
  void Norm(std::string hf, std::string gguf, int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = 1.0f + 0.2f * Uniform();
    tensors_.push_back({std::move(hf), std::move(gguf), {size}, std::move(values)});
  }
  void Bias(std::string hf, std::string gguf, int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = 0.2f * Uniform();
    tensors_.push_back({std::move(hf), std::move(gguf), {size}, std::move(values)});
  }

  const TinyModel& model_;
  std::mt19937 random_;
  std::vector<NamedTensor> tensors_;
};

// Rows of each head from pairs (i, i + head_dim / 2) to pairs (2i, 2i + 1), as converters do.
std::vector<float> Interleave(const NamedTensor& tensor, int head_dim) {
  const int64_t cols = tensor.shape[1];
  std::vector<float> out(tensor.values.size());
  for (int64_t row = 0; row < tensor.shape[0]; ++row) {
    const int64_t head = row / head_dim, channel = row % head_dim;
    const int64_t from = head * head_dim + channel / 2 + (channel % 2) * (head_dim / 2);
    std::copy_n(tensor.values.begin() + from * cols, cols, out.begin() + row * cols);
  }
  return out;
}

// The divisors of each frequency that Llama 3's scaling comes to.
std::vector<float> Llama3Factors(int head_dim) {
  std::vector<float> factors;
  const double two_pi = 2 * 3.14159265358979323846;
  for (int i = 0; i < head_dim; i += 2) {
    const double wavelength = two_pi * std::pow(kRopeTheta, double(i) / head_dim);
    if (wavelength < kLlama3Original / kLlama3High) {
      factors.push_back(1.0f);
    } else if (wavelength > kLlama3Original / kLlama3Low) {
      factors.push_back(kLlama3Factor);
    } else {
      const double smooth =
          (kLlama3Original / wavelength - kLlama3Low) / (kLlama3High - kLlama3Low);
      factors.push_back(static_cast<float>(1.0 / ((1 - smooth) / kLlama3Factor + smooth)));
    }
  }
  return factors;
}

json TinyConfig(const TinyModel& model) {
  json config = {{"model_type", model.architecture},
                 {"num_hidden_layers", model.num_layers},
                 {"hidden_size", model.hidden_size},
                 {"intermediate_size", model.intermediate_size},
                 {"num_attention_heads", model.num_heads},
                 {"num_key_value_heads", model.num_kv_heads},
                 {"head_dim", model.head_dim},
                 {"vocab_size", kTinyVocabSize},
                 {"max_position_embeddings", model.max_position},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", kRopeTheta},
                 {"hidden_act", "silu"},
                 {"tie_word_embeddings", model.tie_embeddings},
                 {"eos_token_id", kTinyEos}};
  if (model.rope_factors) {
    config["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", kLlama3Factor},
                              {"low_freq_factor", kLlama3Low},
                              {"high_freq_factor", kLlama3High},
                              {"original_max_position_embeddings", kLlama3Original}};
  }
  return config;
}

json TinyTokenizerJson() {
  const Vocabulary v = TinyVocabulary();
  json vocab = json::object(), merges = json::array(), added = json::array();
  for (size_t id = 0; id < v.tokens.size(); ++id) {
    if (v.types[id] != 3) {
      vocab[v.tokens[id]] = id;
      continue;
    }
    added.push_back({{"id", id},
                     {"content", v.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  for (const auto& [left, right] : v.merges) merges.push_back(left + " " + right);
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", ""},
            {"end_of_word_suffix", ""},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", merges}}}};
}

void AddTinyMetadata(const TinyModel& model, GgufWriter* out) {
  const std::string prefix = model.architecture + ".";
  out->String("general.architecture", model.architecture);
  out->String("general.name", "tiny " + model.architecture);
  out->Int(prefix + "block_count", model.num_layers);
  out->Int(prefix + "context_length", model.max_position);
  out->Int(prefix + "embedding_length", model.hidden_size);
  out->Int(prefix + "feed_forward_length", model.intermediate_size);
  out->Int(prefix + "attention.head_count", model.num_heads);
  out->Int(prefix + "attention.head_count_kv", model.num_kv_heads);
  out->Int(prefix + "attention.key_length", model.head_dim);
  out->Int(prefix + "attention.value_length", model.head_dim);
  out->Int(prefix + "rope.dimension_count", model.head_dim);
  out->Float(prefix + "rope.freq_base", kRopeTheta);
  out->Float(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
  const Vocabulary v = TinyVocabulary();
  std::vector<std::string> merges;
  for (const auto& [left, right] : v.merges) merges.push_back(left + " " + right);
  out->String("tokenizer.ggml.model", "gpt2");
  out->String("tokenizer.ggml.pre", "gpt-2");
  out->Strings("tokenizer.ggml.tokens", v.tokens);
  out->Ints("tokenizer.ggml.token_type", v.types);
  out->Strings("tokenizer.ggml.merges", merges);
  out->Int("tokenizer.ggml.eos_token_id", kTinyEos);
  out->Bool("tokenizer.ggml.add_bos_token", false);
  out->String("tokenizer.chat_template", kTinyChatTemplate);
}

}  // namespace

// ---- GGUF -----------------------------------------------------------------------------------

void GgufWriter::Value(std::string_view key, uint32_t type, std::string_view payload) {
  entries_.emplace_back(key, ByteWriter().Add(type).Raw(payload).bytes());
}

void GgufWriter::Int(std::string_view key, uint32_t value) {
  Value(key, 4, ByteWriter().Add(value).bytes());
}

void GgufWriter::Float(std::string_view key, float value) {
  Value(key, kFloat32Type, ByteWriter().Add(value).bytes());
}

void GgufWriter::Bool(std::string_view key, bool value) {
  Value(key, 7, ByteWriter().Add<uint8_t>(value).bytes());
}

void GgufWriter::String(std::string_view key, std::string_view value) {
  Value(key, kStringType, ByteWriter().String(value).bytes());
}

void GgufWriter::Ints(std::string_view key, const std::vector<int32_t>& values) {
  ByteWriter out;
  out.Add(kInt32Type).Add<uint64_t>(values.size());
  for (const int32_t value : values) out.Add(value);
  Value(key, kArrayType, out.bytes());
}

void GgufWriter::Floats(std::string_view key, const std::vector<float>& values) {
  ByteWriter out;
  out.Add(kFloat32Type).Add<uint64_t>(values.size()).Raw(EncodeF32(values));
  Value(key, kArrayType, out.bytes());
}

void GgufWriter::Strings(std::string_view key, const std::vector<std::string>& values) {
  ByteWriter out;
  out.Add(kStringType).Add<uint64_t>(values.size());
  for (const std::string& value : values) out.String(value);
  Value(key, kArrayType, out.bytes());
}

void GgufWriter::Tensor(std::string_view name, const std::vector<int64_t>& shape,
                        uint32_t ggml_type, std::string data) {
  tensors_.push_back({std::string(name), shape, ggml_type, std::move(data)});
}

void GgufWriter::Remove(std::string_view key) {
  std::erase_if(entries_, [key](const auto& entry) { return entry.first == key; });
}

void GgufWriter::RemoveTensor(std::string_view name) {
  std::erase_if(tensors_, [name](const TensorEntry& tensor) { return tensor.name == name; });
}

std::string GgufWriter::Build() const {
  ByteWriter out, data;
  out.Raw("GGUF").Add<uint32_t>(3).Add<uint64_t>(tensors_.size()).Add<uint64_t>(entries_.size());
  for (const auto& [key, value] : entries_) out.String(key).Raw(value);
  for (const TensorEntry& tensor : tensors_) {
    out.String(tensor.name).Add<uint32_t>(tensor.shape.size());
    for (auto dim = tensor.shape.rbegin(); dim != tensor.shape.rend(); ++dim) out.Add(*dim);
    data.PadTo(kAlignment);
    out.Add(tensor.ggml_type).Add<uint64_t>(data.bytes().size());
    data.Raw(tensor.data);
  }
  return out.PadTo(kAlignment).Raw(data.bytes()).bytes();
}

GgufWriter TinyGgufWriter(const TinyModel& model) {
  GgufWriter out;
  AddTinyMetadata(model, &out);
  const bool interleaved = !model.architecture.starts_with("qwen");
  for (const NamedTensor& tensor : WeightMaker(model).Make()) {
    const bool permute = interleaved && tensor.permuted_heads > 0;
    const uint32_t type = tensor.shape.size() == 1 ? 0 : model.ggml_type;
    out.Tensor(tensor.gguf_name, tensor.shape, type,
               EncodeGguf(type, permute ? Interleave(tensor, model.head_dim) : tensor.values));
  }
  if (model.rope_factors) {
    const std::vector<float> factors = Llama3Factors(model.head_dim);
    out.Tensor("rope_freqs.weight", {model.head_dim / 2}, 0, EncodeF32(factors));
  }
  return out;
}

void WriteTinyGguf(const fs::path& path, const TinyModel& model) {
  WriteFile(path, TinyGgufWriter(model).Build());
}

// ---- safetensors ----------------------------------------------------------------------------

void SafetensorsWriter::Tensor(std::string_view name, const std::vector<int64_t>& shape,
                               std::string_view dtype, std::string data) {
  if (!header_.empty()) header_ += ",";
  header_ += fmt::format(R"("{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", name,
                         dtype, fmt::join(shape, ","), data_.size(), data_.size() + data.size());
  data_ += data;
}

std::string SafetensorsWriter::Raw(std::string_view header, std::string_view data) {
  return ByteWriter().Add<uint64_t>(header.size()).Raw(header).Raw(data).bytes();
}

std::string SafetensorsWriter::Build() const {
  std::string header = "{" + header_ + "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  return Raw(header, data_);
}

void WriteTinyHfFolder(const fs::path& folder, const TinyModel& model, int num_shards) {
  fs::create_directories(folder);
  WriteFile(folder / "config.json", TinyConfig(model).dump(2));
  WriteFile(folder / "generation_config.json",
            json({{"eos_token_id", {kTinyEos}}, {"temperature", 0.6}, {"top_p", 0.9}}).dump(2));
  WriteFile(folder / "tokenizer.json", TinyTokenizerJson().dump());
  WriteFile(folder / "tokenizer_config.json",
            json({{"eos_token", "<|im_end|>"}, {"chat_template", kTinyChatTemplate}}).dump(2));

  const std::vector<NamedTensor> tensors = WeightMaker(model).Make();
  std::vector<SafetensorsWriter> shards(num_shards);
  json weight_map = json::object();
  const auto file_of = [num_shards](size_t shard) {
    return num_shards == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, num_shards);
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const size_t shard = i * num_shards / tensors.size();
    shards[shard].Tensor(tensors[i].hf_name, tensors[i].shape, model.hf_dtype,
                         EncodeHf(model.hf_dtype, tensors[i].values));
    weight_map[tensors[i].hf_name] = file_of(shard);
  }
  for (size_t i = 0; i < shards.size(); ++i) WriteFile(folder / file_of(i), shards[i].Build());
  if (num_shards > 1) {
    WriteFile(folder / "model.safetensors.index.json",
              json({{"metadata", json::object()}, {"weight_map", weight_map}}).dump(2));
  }
}

// ---- files ----------------------------------------------------------------------------------

void WriteFile(const fs::path& path, std::string_view bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  GLOAM_CHECK(out.good());
}

TempFolder::TempFolder() {
  std::string pattern = (fs::temp_directory_path() / "gloam_test_XXXXXX").string();
  GLOAM_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TempFolder::~TempFolder() {
  std::error_code ignored;  // a folder left behind is no failure of the test
  fs::remove_all(path_, ignored);
}

}  // namespace gloam::test
