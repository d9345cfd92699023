// Writers of small model files for tests: raw GGUF and safetensors builders, and a tiny random
// model of any supported family, as a GGUF file or as a Hugging Face folder with equal weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/model_config.h"

namespace gloam::test {

// Little-endian bytes, as both formats want them.
class ByteWriter {
 public:
  template <typename T>
  ByteWriter& Add(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    return *this;
  }
  ByteWriter& Raw(std::string_view bytes) {
    bytes_.append(bytes);
    return *this;
  }
  // A GGUF string: 64-bit length, then the bytes.
  ByteWriter& String(std::string_view text) { return Add<uint64_t>(text.size()).Raw(text); }
  ByteWriter& PadTo(size_t alignment) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// A GGUF file of version 3. Keys and tensors appear in the order of the calls.
class GgufWriter {
 public:
  void Int(std::string_view key, uint32_t value);
  void Float(std::string_view key, float value);
  void Bool(std::string_view key, bool value);
  void String(std::string_view key, std::string_view value);
  void Ints(std::string_view key, const std::vector<int32_t>& values);
  void Floats(std::string_view key, const std::vector<float>& values);
  void Strings(std::string_view key, const std::vector<std::string>& values);
  // A value of any type: `type` is GGUF's number, `payload` what follows it.
  void Value(std::string_view key, uint32_t type, std::string_view payload);

  // `shape` is outermost first; `ggml_type` is GGUF's number (0 F32, 1 F16, 8 Q8_0, 30 BF16).
  void Tensor(std::string_view name, const std::vector<int64_t>& shape, uint32_t ggml_type,
              std::string data);

  void Remove(std::string_view key);         // forgets a key, if it is there
  void RemoveTensor(std::string_view name);  // the same for a tensor
  std::string Build() const;

 private:
  struct TensorEntry {
    std::string name;
    std::vector<int64_t> shape;
    uint32_t ggml_type;
    std::string data;
  };
  std::vector<std::pair<std::string, std::string>> entries_;  // key, type and payload
  std::vector<TensorEntry> tensors_;
};

// A .safetensors file; tensors follow each other without holes.
class SafetensorsWriter {
 public:
  void Tensor(std::string_view name, const std::vector<int64_t>& shape, std::string_view dtype,
              std::string data);
  std::string Build() const;
  // A file with this header, whatever it says, and this data.
  static std::string Raw(std::string_view header, std::string_view data);

 private:
  std::string header_;  // the entries so far
  std::string data_;
};

// What a tiny model is like. Defaults run in milliseconds and still have grouped heads, a
// feed-forward width that is no power of two, and rows that every block format of 32 divides.
struct TinyModel {
  std::string architecture = "llama";  // as in ModelConfig
  int num_layers = 2;
  int hidden_size = 128;
  int intermediate_size = 192;
  int num_heads = 4;
  int num_kv_heads = 2;
  int head_dim = 64;
  int max_position = 512;
  bool tie_embeddings = true;
  bool rope_factors = false;     // Llama 3's rope scaling (rope_freqs.weight in GGUF)
  uint32_t ggml_type = 0;        // of the matrices of a GGUF file: 0 F32, 1 F16, 8 Q8_0, 30 BF16
  std::string hf_dtype = "F32";  // of a folder's tensors: F32, F16, BF16
  uint32_t seed = 1;
};

// The tiny models' vocabulary: byte-level BPE of 256 bytes, a few merges, <|endoftext|>,
// <|im_start|>, <|im_end|> (which ends an answer), and unused tokens up to this size.
inline constexpr int kTinyVocabSize = 288;
inline constexpr int kTinyEos = 287;
extern const std::string_view kTinyChatTemplate;

GgufWriter TinyGgufWriter(const TinyModel& model);  // to change before Build()
void WriteTinyGguf(const std::filesystem::path& path, const TinyModel& model);

// config.json, generation_config.json, tokenizer.json, tokenizer_config.json, and the weights in
// `num_shards` files (with an index where there are several).
void WriteTinyHfFolder(const std::filesystem::path& folder, const TinyModel& model,
                       int num_shards = 1);

// Writes a file, replacing it.
void WriteFile(const std::filesystem::path& path, std::string_view bytes);

// A new folder that is removed, with what it holds, at the end of the scope.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace gloam::test
