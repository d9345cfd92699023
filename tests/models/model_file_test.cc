// ModelFile over GGUF files and Hugging Face folders: what the numbers come to, and what is
// refused.
#include "models/model_file.h"

#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>

#include "catch2/catch.hpp"
#include "models/hf_model_file.h"
#include "models/inspect.h"
#include "nlohmann/json.hpp"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::GgufWriter;
using test::SafetensorsWriter;
using test::TempFolder;
using test::TinyModel;
using test::WriteFile;

std::string OpenError(const fs::path& path) {
  const auto model = ModelFile::Open(path);
  return model.ok() ? "ok" : MessageOf(model.status());
}

void CheckOpenError(const fs::path& path, const std::string& part) {
  const std::string message = OpenError(path);
  CAPTURE(message);
  CHECK(message.starts_with(path.string()));
  CHECK(message.find('\n') == std::string::npos);
  CHECK(message.find(part) != std::string::npos);
}

json ReadJson(const fs::path& path) {
  std::ifstream in(path);
  return json::parse(in);
}

// GGUF's row of an attention projection from the folder's, which pairs channels otherwise.
int64_t HfRow(int64_t gguf_row, int head_dim) {
  const int64_t head = gguf_row / head_dim, channel = gguf_row % head_dim;
  return head * head_dim + channel / 2 + (channel % 2) * (head_dim / 2);
}

TEST_CASE("A tiny model is the same from GGUF and from a folder", "[model_file]") {
  const std::string architecture = GENERATE("llama", "mistral", "qwen2", "qwen3", "smollm3");
  const int num_shards = GENERATE(1, 3);
  CAPTURE(architecture, num_shards);
  const TinyModel tiny{.architecture = architecture, .num_layers = 4, .tie_embeddings = false};
  const TempFolder folder;
  test::WriteTinyGguf(folder.path() / "m.gguf", tiny);
  test::WriteTinyHfFolder(folder.path() / "hf", tiny, num_shards);
  const auto gguf = ModelFile::Open(folder.path() / "m.gguf");
  const auto hf = ModelFile::Open(folder.path() / "hf");
  INFO(gguf.status().ToString() << " " << hf.status().ToString());
  REQUIRE(gguf.ok());
  REQUIRE(hf.ok());
  for (const ModelConfig& c : {(*gguf)->config(), (*hf)->config()}) {
    CHECK(c.architecture == architecture);
    CHECK(c.num_layers == 4);
    CHECK(c.hidden_size == tiny.hidden_size);
    CHECK(c.num_heads == tiny.num_heads);
    CHECK(c.num_kv_heads == tiny.num_kv_heads);
    CHECK(c.head_dim == tiny.head_dim);
    CHECK(c.rotary_dim == tiny.head_dim);
    CHECK(c.vocab_size == test::kTinyVocabSize);
    CHECK(c.max_position == tiny.max_position);
    CHECK(c.rms_norm_eps == 1e-5f);
    CHECK_FALSE(c.tie_embeddings);
    CHECK(c.qk_norm == (architecture == "qwen3"));
    CHECK(c.attention_bias == (architecture == "qwen2"));
    if (architecture == "smollm3") {
      CHECK(c.layer_uses_rope == std::vector<bool>{true, true, true, false});
    } else {
      CHECK(c.layer_uses_rope.empty());
    }
  }
  const bool interleaved = !architecture.starts_with("qwen");
  CHECK((*gguf)->config().rope_style == (interleaved ? RopeStyle::kInterleaved : RopeStyle::kNeox));
  CHECK((*hf)->config().rope_style == RopeStyle::kNeox);
  CHECK((*gguf)->chat_template() == test::kTinyChatTemplate);
  CHECK((*hf)->chat_template() == test::kTinyChatTemplate);
  CHECK((*hf)->generation_defaults().temperature == 0.6f);
  CHECK((*hf)->generation_defaults().eos_token_ids == std::vector<int32_t>{test::kTinyEos});

  REQUIRE((*gguf)->tensors().size() == (*hf)->tensors().size());
  for (const TensorInfo& tensor : (*gguf)->tensors()) {
    CAPTURE(tensor.name);
    const auto other = (*hf)->Find(tensor.name);
    REQUIRE(other.ok());
    CHECK(other->shape == tensor.shape);
    const bool permuted = interleaved && (tensor.name.ends_with("attn_q.weight") ||
                                          tensor.name.ends_with("attn_k.weight"));
    const int64_t row_bytes = RowBytes(tensor.data.type, tensor.data.cols);
    bool equal = true;
    for (int64_t row = 0; row < tensor.data.rows; ++row) {
      const int64_t other_row = permuted ? HfRow(row, tiny.head_dim) : row;
      equal = equal && std::memcmp(tensor.data.data + row * row_bytes,
                                   other->data.data + other_row * row_bytes, row_bytes) == 0;
    }
    CHECK(equal);
  }
  CHECK((*gguf)->Find("nosuch").status().code() == StatusCode::kNotFound);
  CHECK_FALSE((*gguf)->Has("nosuch"));
}

TEST_CASE("Rope scaling is read from both formats", "[model_file]") {
  const TinyModel tiny{.rope_factors = true};
  const TempFolder folder;
  test::WriteTinyGguf(folder.path() / "m.gguf", tiny);
  test::WriteTinyHfFolder(folder.path() / "hf", tiny);
  const auto gguf = ModelFile::Open(folder.path() / "m.gguf");
  const auto hf = ModelFile::Open(folder.path() / "hf");
  REQUIRE(gguf.ok());
  REQUIRE(hf.ok());
  CHECK((*gguf)->config().rope_scaling.freq_factors.size() == 32);
  CHECK((*gguf)->config().rope_scaling.freq_factors.back() == 8.0f);
  CHECK_FALSE((*gguf)->Has("rope_freqs.weight"));
  CHECK((*hf)->config().rope_scaling.type == RopeScaling::Type::kLlama3);
  CHECK((*hf)->config().rope_scaling.factor == 8.0f);
  CHECK((*hf)->config().rope_scaling.original_max_position == 64);

  GgufWriter linear = test::TinyGgufWriter({});
  linear.String("llama.rope.scaling.type", "linear");
  linear.Float("llama.rope.scaling.factor", 4.0f);
  WriteFile(folder.path() / "linear.gguf", linear.Build());
  const auto scaled = ModelFile::Open(folder.path() / "linear.gguf");
  REQUIRE(scaled.ok());
  CHECK((*scaled)->config().rope_scaling.type == RopeScaling::Type::kLinear);
  CHECK((*scaled)->config().rope_scaling.factor == 4.0f);
}

TEST_CASE("Impossible GGUF models are refused by key or tensor", "[model_file]") {
  const TempFolder folder;
  const fs::path path = folder.path() / "m.gguf";
  const auto check_int = [&](const std::string& key, uint32_t value, const std::string& part) {
    CAPTURE(key, value);
    GgufWriter out = test::TinyGgufWriter({});
    out.Remove(key);
    out.Int(key, value);
    WriteFile(path, out.Build());
    CheckOpenError(path, part);
  };
  check_int("llama.block_count", 0, "key 'llama.block_count' is 0; it must be in [1, ");
  check_int("llama.block_count", 3, "tensor 'blk.2.attn_norm.weight' is missing");
  check_int("llama.block_count", 1, "tensor 'blk.1.attn_norm.weight' is not one that a llama");
  check_int("llama.block_count", ~0u, "key 'llama.block_count' is 4294967295");
  check_int("llama.attention.head_count", 0, "key 'llama.attention.head_count' is 0");
  check_int("llama.attention.head_count_kv", 0, "key 'llama.attention.head_count_kv' is 0");
  check_int("llama.attention.head_count_kv", 3, "must be a multiple of");
  check_int("llama.attention.head_count_kv", 8, "key 'llama.attention.head_count_kv' is 8");
  check_int("llama.attention.value_length", 32, "differs from the keys' head size");
  check_int("llama.rope.dimension_count", 66, "key 'llama.rope.dimension_count' is 66");
  check_int("llama.rope.dimension_count", 63, "must be even");
  check_int("llama.context_length", 0, "key 'llama.context_length' is 0");
  check_int("llama.embedding_length", 64, "tensor 'token_embd.weight' has the shape [288, 128]");
  check_int("llama.feed_forward_length", 96, "tensor 'blk.0.ffn_gate.weight' has the shape");
  check_int("llama.expert_count", 8, "mixture-of-experts models are not supported");
  check_int("llama.vocab_size", 300, "key 'llama.vocab_size' is 300, and 'token_embd.weight' has");

  const auto check_float = [&](const std::string& key, float value, const std::string& part) {
    CAPTURE(key, value);
    GgufWriter out = test::TinyGgufWriter({});
    out.Remove(key);
    out.Float(key, value);
    WriteFile(path, out.Build());
    CheckOpenError(path, part);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, infinity, 0.0f, -1.0f}) {
    check_float("llama.rope.freq_base", bad, "key 'llama.rope.freq_base' is ");
    check_float("llama.rope.scaling.factor", bad, "key 'llama.rope.scaling.factor' is ");
    check_float("llama.attention.layer_norm_rms_epsilon", bad, "rms_epsilon' is ");
  }
  const auto check_change = [&](auto change, const std::string& part) {
    CAPTURE(part);
    GgufWriter out = test::TinyGgufWriter({});
    change(out);
    WriteFile(path, out.Build());
    CheckOpenError(path, part);
  };
  check_change([](GgufWriter& out) { out.Remove("general.architecture"); },
               "key 'general.architecture' is missing");
  check_change([](GgufWriter& out) { out.Remove("llama.attention.layer_norm_rms_epsilon"); },
               "rms_epsilon' is missing");
  check_change(
      [](GgufWriter& out) {
        out.Remove("general.architecture");
        out.String("general.architecture", "mamba\n");
      },
      "key 'general.architecture' is 'mamba\\\\x0a'; llama, mistral");
  check_change([](GgufWriter& out) { out.String("llama.rope.scaling.type", "yarn"); },
               "key 'llama.rope.scaling.type' is 'yarn'");
  check_change(
      [](GgufWriter& out) {
        out.Remove("tokenizer.ggml.tokens");
        out.Strings("tokenizer.ggml.tokens", {"a", "b"});
      },
      "key 'tokenizer.ggml.tokens' has 2 tokens, and 'token_embd.weight' has 288 rows");
  check_change([](GgufWriter& out) { out.RemoveTensor("token_embd.weight"); },
               "tensor 'token_embd.weight' is missing");
  check_change([](GgufWriter& out) { out.Tensor("extra", {8}, 0, std::string(32, '\0')); },
               "tensor 'extra' is not one that a llama model");
  check_change(
      [](GgufWriter& out) {
        out.RemoveTensor("output_norm.weight");
        out.Tensor("output_norm.weight", {128}, 8, std::string(4 * 34, '\0'));
      },
      "tensor 'output_norm.weight' is of type Q8_0");
  check_change(
      [](GgufWriter& out) { out.Tensor("rope_freqs.weight", {32}, 0, std::string(128, '\0')); },
      "tensor 'rope_freqs.weight' has 0 at index 0");
  check_change(
      [](GgufWriter& out) { out.Tensor("rope_freqs.weight", {16}, 0, std::string(64, '\0')); },
      "tensor 'rope_freqs.weight' must be F32 of 32 elements");
}

TEST_CASE("Impossible config.json files are refused by field", "[model_file]") {
  const TempFolder temp;
  const fs::path folder = temp.path() / "hf";
  test::WriteTinyHfFolder(folder, {});
  const json good = ReadJson(folder / "config.json");
  const auto check = [&](const std::string& field, const json& value, const std::string& part) {
    CAPTURE(field, value.dump());
    json config = good;
    config[field] = value;
    WriteFile(folder / "config.json", config.dump());
    CheckOpenError(folder, part);
  };
  fs::remove(folder / "generation_config.json");  // its eos_token_id would hold
  check("model_type", "mixtral", "model_type is 'mixtral'; llama, mistral");
  check("model_type", nullptr, "model_type is missing");
  check("num_hidden_layers", 0, "num_hidden_layers is 0");
  check("num_hidden_layers", -2, "num_hidden_layers must be an integer in [0, ");
  check("num_hidden_layers", 2.5, "num_hidden_layers must be an integer");
  check("num_hidden_layers", 1ull << 40, "num_hidden_layers must be an integer in [0, ");
  check("num_attention_heads", 0, "num_attention_heads is 0");
  check("num_key_value_heads", 3, "must be a multiple of num_key_value_heads (3)");
  check("num_key_value_heads", 0, "num_key_value_heads is 0");
  check("head_dim", 63, "head_dim is 63; it must be even");
  check("vocab_size", 300, "tensor 'token_embd.weight' has the shape [288, 128]");
  check("vocab_size", 0, "vocab_size is 0");
  check("rms_norm_eps", 0, "rms_norm_eps is 0");
  check("rms_norm_eps", "small", "rms_norm_eps must be a number");
  check("rope_theta", -1.0, "rope_theta is -1");
  check("rope_theta", 1e300, "rope_theta must be a finite number");
  check("hidden_act", "gelu", "hidden_act is 'gelu'");
  check("mlp_bias", true, "mlp_bias is not supported");
  check("quantization_config", {{"bits", 4}}, "quantization_config");
  check("eos_token_id", 9999, "eos_token_id");
  check("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}}, "rope_scaling.rope_type is 'yarn'");
  check("rope_scaling", {{"type", "dynamic"}, {"factor", 4}},
        "rope_scaling.rope_type is 'dynamic'");
  check("rope_scaling", {{"type", "linear"}}, "rope_scaling.factor is missing");
  check("rope_scaling", {{"type", "linear"}, {"factor", 0}}, "rope_scaling.factor is 0");
  check("rope_scaling", "linear", "rope_scaling must be an object");
  check("rope_parameters", {{"full_attention", {{"rope_type", "default"}}}},
        "rope_parameters.full_attention");

  json config = good;
  config.erase("rope_theta");
  config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}};
  WriteFile(folder / "config.json", config.dump());
  const auto newer = ModelFile::Open(folder);
  REQUIRE(newer.ok());
  CHECK((*newer)->config().rope_theta == 5e5f);
  CHECK((*newer)->config().rope_scaling.type == RopeScaling::Type::kLinear);

  WriteFile(folder / "config.json", "{\"a\":1,\"a\":2}");
  CheckOpenError(folder, "config.json: the key 'a' is there twice");
  WriteFile(folder / "config.json", "[1]");
  CheckOpenError(folder, "config.json: not a JSON object");
  WriteFile(folder / "config.json", "{\"a\":NaN}");
  CheckOpenError(folder, "config.json: not valid JSON (at byte ");
  WriteFile(folder / "config.json", "{\"a\":" + std::string(100000, '['));
  CheckOpenError(folder, "config.json: the JSON nests deeper than 64");
  WriteFile(folder / "config.json", "{\"a\":");
  CheckOpenError(folder, "config.json: the JSON ends too early");
  fs::remove(folder / "config.json");
  CheckOpenError(folder, "config.json: no such file");
}

TEST_CASE("Sliding windows hold for all layers or for none", "[model_file]") {
  const TempFolder temp;
  const fs::path folder = temp.path() / "hf";
  test::WriteTinyHfFolder(folder, {.architecture = "qwen2"});
  const json good = ReadJson(folder / "config.json");
  const auto window = [&](const json& changes) {
    json config = good;
    config.update(changes);
    WriteFile(folder / "config.json", config.dump());
    const auto model = ModelFile::Open(folder);
    return model.ok() ? std::to_string((*model)->config().sliding_window)
                      : MessageOf(model.status());
  };
  CHECK(window({{"sliding_window", 64}}) == "0");  // Qwen's window is off unless it says so
  CHECK(window({{"sliding_window", 64}, {"use_sliding_window", true}}) == "64");
  CHECK(window({{"sliding_window", 4096}, {"use_sliding_window", true}}) == "0");
  CHECK(window({{"sliding_window", 64}, {"use_sliding_window", true}, {"max_window_layers", 2}}) ==
        "0");
  CHECK(window({{"sliding_window", 64}, {"use_sliding_window", true}, {"max_window_layers", 1}})
            .find("1 of 2 layers have a sliding_window") != std::string::npos);
  CHECK(window({{"sliding_window", 64}, {"layer_types", {"full_attention", "sliding_attention"}}})
            .find("1 of 2 layers") != std::string::npos);
}

TEST_CASE("Bad shards, indexes and pickle files are refused", "[model_file]") {
  const TempFolder temp;
  const fs::path folder = temp.path() / "hf";
  test::WriteTinyHfFolder(folder, {}, 2);
  const fs::path index_path = folder / "model.safetensors.index.json";
  const json good = ReadJson(index_path);
  const auto check = [&](const std::string& file, const std::string& part) {
    CAPTURE(file);
    json index = good;
    index["weight_map"]["model.norm.weight"] = file;
    WriteFile(index_path, index.dump());
    CheckOpenError(folder, part);
  };
  const std::string other = "model-00002-of-00002.safetensors";
  for (const char* outside :
       {"../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", ""}) {
    check(outside, "it must be a .safetensors file of this folder");
  }
  check("pytorch_model.bin", "pickle files are refused");
  check(other, "tensor 'model.norm.weight' is not in model.safetensors.index.json's list");
  json extra = good;
  extra["weight_map"]["model.layers.7.mlp.up_proj.weight"] = other;
  WriteFile(index_path, extra.dump());
  CheckOpenError(folder, "tensor 'model.layers.7.mlp.up_proj.weight' is missing");
  extra["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00000-of-00002.safetensors";
  WriteFile(index_path, extra.dump());
  CheckOpenError(folder, "model-00000-of-00002.safetensors: no such file");
  WriteFile(index_path, "{\"weight_map\": []}");
  CheckOpenError(folder, "weight_map must be an object");
  WriteFile(index_path, good.dump());
  CHECK(OpenError(folder) == "ok");
  fs::remove(folder / other);
  CheckOpenError(folder, other + ": no such file");

  fs::remove(index_path);
  CheckOpenError(folder, "neither model.safetensors nor");
  WriteFile(folder / "pytorch_model.bin", "x");
  CheckOpenError(folder, "pytorch_model.bin: pickle files are refused");
  CheckOpenError(folder / "pytorch_model.bin", "pickle files are refused");
  CheckOpenError(folder / other, "give the folder that holds this file");
  CheckOpenError(folder / "nosuch.gguf", "no such file");
  WriteFile(folder / "empty.gguf", "");
  CheckOpenError(folder / "empty.gguf", "the file is empty");
}

TEST_CASE("Chat templates come from a file of their own, a string or a list", "[model_file]") {
  const TempFolder temp;
  const fs::path folder = temp.path() / "hf";
  test::WriteTinyHfFolder(folder, {});
  const auto chat_template = [&](const json& value) {
    WriteFile(folder / "tokenizer_config.json", json({{"chat_template", value}}).dump());
    const auto model = ModelFile::Open(folder);
    return model.ok() ? (*model)->chat_template() : MessageOf(model.status());
  };
  CHECK(chat_template("one") == "one");
  CHECK(chat_template(nullptr) == "");
  CHECK(chat_template({{{"name", "tool_use"}, {"template", "two"}},
                       {{"name", "default"}, {"template", "three"}}}) == "three");
  CHECK(chat_template(7).find("chat_template must be a string or a list") != std::string::npos);
  WriteFile(folder / "chat_template.jinja", "four");
  CHECK(chat_template("one") == "four");
}

TEST_CASE("The inspect report states what the file holds", "[model_file]") {
  const TempFolder folder;
  test::WriteTinyGguf(folder.path() / "m.gguf", {.ggml_type = 8});
  const auto model = ModelFile::Open(folder.path() / "m.gguf");
  REQUIRE(model.ok());
  std::ostringstream out;
  InspectModel(**model, {.list_tensors = true}, out);
  const std::string report = out.str();
  CAPTURE(report);
  for (const char* part : {"tiny llama", "4 heads, 2 KV heads, 64 channels", "base 10000",
                           "512 tokens", "1024 bytes a token", "Q8_0", "F32", "288 tokens, tied",
                           "chat template    yes", "blk.1.ffn_down.weight", "[128, 192]"}) {
    CAPTURE(part);
    CHECK(report.find(part) != std::string::npos);
  }
}

}  // namespace
}  // namespace gloam
