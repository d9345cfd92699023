#include "models/random_model_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>

#include "fmt/ranges.h"
#include "kernels/float16.h"

namespace gloam {
namespace {

struct Shape {
  std::string_view name, architecture;
  int layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, max_position;
  float rope_theta;
  bool tied, bias;
};

constexpr Shape kShapes[] = {
    {"llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5f, false, false},
    {"llama-2-7b", "llama", 32, 4096, 11008, 32, 32, 128, 32000, 131072, 1e4f, false, false},
    {"qwen2.5-1.5b", "qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 32768, 1e6f, true, true},
    {"smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5f, true, false},
};

constexpr WeightType kTypes[] = {WeightType::kBF16, WeightType::kQ4_0, WeightType::kQ8_0};
constexpr float kDeviation = 0.02f;  // of a weight: what trained matrices have

std::string LowerName(WeightType type) {
  std::string name(InfoOf(type).name);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return name;
}

ModelConfig ConfigOf(const Shape& shape) {
  ModelConfig config;
  config.architecture = shape.architecture;
  config.name = fmt::format("{} (random weights)", shape.name);
  config.num_layers = shape.layers;
  config.hidden_size = shape.hidden;
  config.intermediate_size = shape.intermediate;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = config.rotary_dim = shape.head_dim;
  config.vocab_size = shape.vocab;
  config.max_position = shape.max_position;
  config.rope_theta = shape.rope_theta;
  config.tie_embeddings = shape.tied;
  config.attention_bias = shape.bias;
  return config;
}

// Fills `bytes`, a whole number of blocks, with weights of about kDeviation.
void FillRandom(WeightType type, std::byte* data, size_t bytes) {
  std::mt19937_64 random(1);
  if (type == WeightType::kBF16) {
    std::normal_distribution<float> normal(0, kDeviation);
    // A table of a prime length: drawing every element would take seconds.
    std::vector<uint16_t> table(65537);
    for (uint16_t& x : table) x = std::bit_cast<uint32_t>(normal(random)) >> 16;  // bf16, cut off
    auto* out = reinterpret_cast<uint16_t*>(data);
    for (size_t i = 0; i < bytes / 2; ++i) out[i] = table[(i * 7919) % table.size()];
    return;
  }
  const int bits = type == WeightType::kQ4_0 ? 4 : 8;
  const auto block_bytes = static_cast<size_t>(InfoOf(type).block_bytes);
  // Uniform quants deviate by 2^bits / sqrt(12) steps.
  const uint16_t scale = F32ToF16(kDeviation * 3.46f / static_cast<float>(1 << bits));
  for (size_t at = 0; at < bytes; at += block_bytes) {
    std::memcpy(data + at, &scale, sizeof(scale));
    for (size_t i = sizeof(scale); i < block_bytes; i += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(data + at + i, &word, std::min(sizeof(word), block_bytes - i));
    }
  }
}

}  // namespace

RandomModelFile::Range::~Range() {
  if (data != nullptr) munmap(data, bytes);
}

std::vector<std::string_view> RandomModelFile::ShapeNames() {
  std::vector<std::string_view> names;
  for (const Shape& shape : kShapes) names.push_back(shape.name);
  return names;
}

StatusOr<std::unique_ptr<ModelFile>> RandomModelFile::Create(std::string_view shape,
                                                             std::string_view type) {
  const auto* found = std::find_if(std::begin(kShapes), std::end(kShapes),
                                   [&](const Shape& s) { return s.name == shape; });
  if (found == std::end(kShapes)) {
    return InvalidArgument("'{}' is not a known shape; known are {}", shape,
                           fmt::join(ShapeNames(), ", "));
  }
  const auto* weight_type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                         [&](WeightType t) { return LowerName(t) == type; });
  if (weight_type == std::end(kTypes)) {
    return InvalidArgument("'{}' is not a type of random weights: bf16, q4_0, q8_0", type);
  }
  std::unique_ptr<RandomModelFile> file(new RandomModelFile());
  file->config_ = ConfigOf(*found);
  const ModelConfig& c = file->config_;
  const int64_t largest = int64_t{c.hidden_size} *
                          std::max({c.vocab_size, c.intermediate_size, c.num_heads * c.head_dim});
  GLOAM_RETURN_IF_ERROR(
      file->MapWeights(*weight_type, static_cast<size_t>(RowBytes(*weight_type, largest))));
  file->AddTensors(*weight_type);
  return std::unique_ptr<ModelFile>(std::move(file));
}

StatusOr<std::unique_ptr<Tokenizer>> RandomModelFile::LoadTokenizer() const {
  return Unimplemented("{}: random weights have no tokenizer", config_.name);
}

// One piece of random bytes in an anonymous file, mapped side by side until `bytes` are covered.
Status RandomModelFile::MapWeights(WeightType type, size_t bytes) {
  constexpr size_t kPieceBytes = size_t{64} << 20;
  const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Whole pages and whole blocks, so that blocks go on across the seams.
  const size_t unit = std::lcm(page_bytes, static_cast<size_t>(InfoOf(type).block_bytes));
  const size_t piece_bytes = kPieceBytes / unit * unit;
  const size_t num_pieces = (bytes + piece_bytes - 1) / piece_bytes;
  const auto failed = [] {
    return ResourceExhausted("cannot map random weights: {}", std::strerror(errno));
  };

  const int file = memfd_create("gloam-random-weights", MFD_CLOEXEC);
  if (file < 0) return failed();
  bool ok = ftruncate(file, static_cast<off_t>(piece_bytes)) == 0;
  void* range = ok ? mmap(nullptr, num_pieces * piece_bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                   : MAP_FAILED;
  ok = range != MAP_FAILED;
  if (ok) {
    weights_.data = static_cast<std::byte*>(range);
    weights_.bytes = num_pieces * piece_bytes;
  }
  for (size_t i = 0; ok && i < num_pieces; ++i) {
    ok = mmap(weights_.data + i * piece_bytes, piece_bytes, PROT_READ | PROT_WRITE,
              MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED;
  }
  if (ok) FillRandom(type, weights_.data, piece_bytes);
  const Status status = ok ? OkStatus() : failed();
  close(file);
  return status;
}

void RandomModelFile::AddTensors(WeightType type) {
  const ModelConfig& c = config_;
  const int64_t q_rows = int64_t{c.num_heads} * c.head_dim;
  const int64_t kv_rows = int64_t{c.num_kv_heads} * c.head_dim;
  vectors_.assign(std::max<int64_t>({c.hidden_size, q_rows, kv_rows}), 1.0f);
  const auto matrix = [&](std::string name, int64_t rows, int64_t cols) {
    tensors_.push_back({.name = std::move(name),
                        .shape = {rows, cols},
                        .data = {weights_.data, type, rows, cols}});
  };
  const auto vector = [&](std::string name, int64_t size) {
    const auto* data = reinterpret_cast<const std::byte*>(vectors_.data());
    tensors_.push_back(
        {.name = std::move(name), .shape = {size}, .data = {data, WeightType::kF32, 1, size}});
  };
  matrix("token_embd.weight", c.vocab_size, c.hidden_size);
  if (!c.tie_embeddings) matrix("output.weight", c.vocab_size, c.hidden_size);
  vector("output_norm.weight", c.hidden_size);
  for (int i = 0; i < c.num_layers; ++i) {
    const auto name = [i](const char* tensor) { return fmt::format("blk.{}.{}", i, tensor); };
    vector(name("attn_norm.weight"), c.hidden_size);
    matrix(name("attn_q.weight"), q_rows, c.hidden_size);
    matrix(name("attn_k.weight"), kv_rows, c.hidden_size);
    matrix(name("attn_v.weight"), kv_rows, c.hidden_size);
    if (c.attention_bias) {
      vector(name("attn_q.bias"), q_rows);
      vector(name("attn_k.bias"), kv_rows);
      vector(name("attn_v.bias"), kv_rows);
    }
    matrix(name("attn_output.weight"), c.hidden_size, q_rows);
    vector(name("ffn_norm.weight"), c.hidden_size);
    matrix(name("ffn_gate.weight"), c.intermediate_size, c.hidden_size);
    matrix(name("ffn_up.weight"), c.intermediate_size, c.hidden_size);
    matrix(name("ffn_down.weight"), c.hidden_size, c.intermediate_size);
  }
}

}  // namespace gloam
