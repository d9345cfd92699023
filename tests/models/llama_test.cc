// Llama over tiny random models of every family: against a double-precision reference of the whole
// forward pass, and bitwise the same whatever the chunks and the neighbours in the batch.
#include "models/llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "tests/models/paged_runner.h"
#include "tests/models/tiny_model.h"

namespace gloam {
namespace {

constexpr int kNumThreads = 2;
constexpr int kMaxTokens = 128;
constexpr int kNumBlocks = 64;

ModelConfig TinyConfig(const std::string& architecture) {
  ModelConfig config;
  config.architecture = architecture;
  config.num_layers = 3;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = 80;
  config.max_position = 256;
  config.rotary_dim = 64;
  return config;
}

// Every family, with what sets it apart, at lengths where that matters.
std::vector<std::pair<std::string, ModelConfig>> Families() {
  std::vector<std::pair<std::string, ModelConfig>> families;
  const auto add = [&families](std::string name, ModelConfig config) {
    families.emplace_back(std::move(name), std::move(config));
  };
  ModelConfig config = TinyConfig("llama");
  config.rope_style = RopeStyle::kInterleaved;
  config.tie_embeddings = true;
  add("SmolLM2: interleaved rope, tied embeddings", config);

  config.tie_embeddings = false;
  config.num_kv_heads = 4;
  config.head_dim = config.rotary_dim = 128;
  add("Llama 2: no groups, head_dim 128, untied embeddings", config);

  config = TinyConfig("llama");
  config.num_heads = 6;
  config.rope_scaling = {.type = RopeScaling::Type::kLlama3,
                         .factor = 8.0f,
                         .low_freq_factor = 1.0f,
                         .high_freq_factor = 4.0f,
                         .original_max_position = 32};
  add("Llama 3: its rope scaling", config);

  config.rope_scaling = {.type = RopeScaling::Type::kLinear, .factor = 4.0f};
  config.rotary_dim = 32;
  add("Llama: linear rope scaling, part of the head rotated", config);

  config.rope_scaling = {};
  config.rotary_dim = 64;
  for (int i = 0; i < config.rotary_dim / 2; ++i) {
    config.rope_scaling.freq_factors.push_back(1.0f + static_cast<float>(i) / 8);
  }
  config.rope_style = RopeStyle::kInterleaved;
  add("Llama 3 in GGUF: a factor per frequency", config);

  config = TinyConfig("mistral");
  config.rope_style = RopeStyle::kInterleaved;
  config.sliding_window = 20;
  add("Mistral: sliding window", config);

  config = TinyConfig("qwen2");
  config.num_heads = 7;
  config.num_kv_heads = 1;
  config.attention_bias = true;
  config.tie_embeddings = true;
  add("Qwen2: biases on Q, K and V", config);

  config = TinyConfig("qwen3");
  config.head_dim = config.rotary_dim = 128;
  config.qk_norm = true;
  add("Qwen3: norm of Q and K per head, head_dim apart from hidden_size", config);

  config = TinyConfig("smollm3");
  config.num_layers = 4;
  config.layer_uses_rope = {true, true, true, false};
  add("SmolLM3: a layer without rope", config);
  return families;
}

// A tiny model on the CPU backend.
struct LoadedTinyModel {
  LoadedTinyModel(const TinyModelFile& file, CpuActivations activations, DType kv_dtype,
                  uint64_t seed)
      : ops(MakeCpuOps({.num_threads = kNumThreads, .activations = activations})) {
    auto loaded = Llama::Load(file, *ops, {});
    INFO(loaded.status());
    REQUIRE(loaded.ok());
    model = std::move(*loaded);
    REQUIRE(ReserveSteps(*model, *ops, kv_dtype, kMaxTokens, kMaxTokens).ok());
    runner = std::make_unique<PagedRunner>(*model, *ops, kv_dtype, kNumBlocks, seed);
  }

  std::unique_ptr<Ops> ops;
  std::unique_ptr<Model> model;
  std::unique_ptr<PagedRunner> runner;
};

std::vector<int32_t> RandomTokens(int count, int vocab_size, std::mt19937_64& random) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab_size);
  return tokens;
}

std::vector<int> AllRows(size_t count) {
  std::vector<int> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

// Row `i` of a step's logits, copied out.
std::vector<float> LogitRow(const TensorView& logits, int64_t i) {
  const TensorView row = logits.Rows(i, 1);
  const float* data = row.Data<float>();
  return {data, data + row.shape[1]};
}

// Logits of every position of `tokens`, computed in one step.
std::vector<std::vector<float>> WholePrefill(PagedRunner& runner, std::span<const int32_t> tokens) {
  runner.Clear();
  const TensorView logits = runner.Step(
      {.sequence = runner.AddSequence(), .tokens = tokens, .logit_rows = AllRows(tokens.size())});
  std::vector<std::vector<float>> rows;
  for (size_t i = 0; i < tokens.size(); ++i) rows.push_back(LogitRow(logits, i));
  return rows;
}

TEST_CASE("Llama agrees with the double-precision reference for every family") {
  constexpr uint64_t kSeed = 20251122;
  // fp32 sums of at most 512 terms through 3 or 4 layers; 1e-6 to 5e-6 of the largest logit were
  // seen.
  constexpr double kTolerance = 5e-5;
  for (const auto& [name, config] : Families()) {
    for (const bool mixed_types : {false, true}) {
      CAPTURE(name, mixed_types, kSeed);
      std::mt19937_64 random(kSeed);
      const TinyModelFile file(config, mixed_types, kSeed);
      const std::vector<int32_t> tokens = RandomTokens(70, config.vocab_size, random);
      const auto expected = ReferenceLogits(file, tokens);
      LoadedTinyModel loaded(file, CpuActivations::kF32, DType::kF32, kSeed);
      const auto actual = WholePrefill(*loaded.runner, tokens);

      double max_logit = 0, max_error = 0;
      for (size_t t = 0; t < tokens.size(); ++t) {
        for (int i = 0; i < config.vocab_size; ++i) {
          max_logit = std::max(max_logit, std::abs(expected[t][i]));
          max_error = std::max(max_error, std::abs(expected[t][i] - actual[t][i]));
        }
      }
      CHECK(max_logit > 0.5);  // the model says something
      CHECK(max_error < kTolerance * max_logit);
    }
  }
}

// One of several sequences that a random mix of steps works off.
struct Stream {
  std::vector<int32_t> tokens;
  std::vector<std::vector<float>> expected;  // logits per position, from a whole prefill
  size_t done = 0;
};

TEST_CASE("Chunked prefill and decode give the bits of a whole prefill, in any company") {
  constexpr uint64_t kSeed = 7;
  for (const auto& [name, config] : Families()) {
    for (const CpuActivations activations : {CpuActivations::kInt8, CpuActivations::kF32}) {
      const bool fast = activations == CpuActivations::kInt8;
      CAPTURE(name, fast, kSeed);
      std::mt19937_64 random(kSeed);
      const TinyModelFile file(config, /*mixed_types=*/true, kSeed);
      LoadedTinyModel loaded(file, activations, fast ? DType::kBF16 : DType::kF32, kSeed);
      PagedRunner& runner = *loaded.runner;

      std::vector<Stream> streams;
      for (const int length : {1, 16, 17, 49, 70}) {
        Stream stream = {.tokens = RandomTokens(length, config.vocab_size, random)};
        stream.expected = WholePrefill(runner, stream.tokens);
        streams.push_back(std::move(stream));
      }
      runner.Clear();
      for (size_t i = 0; i < streams.size(); ++i) runner.AddSequence();

      // Each step takes a random subset: decode rows (one token) and chunks of up to 24.
      int rows_different = 0, rows_seen = 0;
      while (true) {
        std::vector<PagedRunner::Chunk> chunks;
        bool any_left = false;
        for (size_t i = 0; i < streams.size(); ++i) {
          Stream& stream = streams[i];
          const size_t left = stream.tokens.size() - stream.done;
          any_left |= left > 0;
          if (left == 0 || random() % 3 == 0) continue;
          const size_t count = random() % 2 == 0 ? 1 : std::min<size_t>(left, 1 + random() % 24);
          chunks.push_back({.sequence = static_cast<int>(i),
                            .tokens = std::span(stream.tokens).subspan(stream.done, count),
                            .logit_rows = AllRows(count)});
        }
        if (!any_left) break;
        if (chunks.empty()) continue;
        const TensorView logits = runner.Step(chunks);
        int64_t row = 0;
        for (const PagedRunner::Chunk& chunk : chunks) {
          Stream& stream = streams[chunk.sequence];
          for (size_t i = 0; i < chunk.tokens.size(); ++i) {
            const std::vector<float> actual = LogitRow(logits, row++);
            const std::vector<float>& expected = stream.expected[stream.done++];
            rows_different +=
                std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(float)) != 0;
            ++rows_seen;
          }
        }
      }
      CHECK(rows_seen == 1 + 16 + 17 + 49 + 70);
      CHECK(rows_different == 0);
    }
  }
}

TEST_CASE("Only the rows asked for get logits, and a step may ask for none") {
  constexpr uint64_t kSeed = 3;
  const ModelConfig config = Families()[0].second;
  const TinyModelFile file(config, /*mixed_types=*/false, kSeed);
  LoadedTinyModel loaded(file, CpuActivations::kInt8, DType::kBF16, kSeed);
  std::mt19937_64 random(kSeed);
  const std::vector<int32_t> tokens = RandomTokens(40, config.vocab_size, random);
  const auto all = WholePrefill(*loaded.runner, tokens);

  loaded.runner->Clear();
  const int sequence = loaded.runner->AddSequence();
  const std::span<const int32_t> span(tokens);
  const TensorView none = loaded.runner->Step({.sequence = sequence, .tokens = span.first(10)});
  CHECK(none.shape[0] == 0);
  const TensorView two = loaded.runner->Step(
      {.sequence = sequence, .tokens = span.subspan(10), .logit_rows = {29, 5}});
  REQUIRE(two.shape[0] == 2);
  CHECK(LogitRow(two, 0) == all[39]);
  CHECK(LogitRow(two, 1) == all[15]);
}

TEST_CASE("Reserve may be called again with other sizes") {
  constexpr uint64_t kSeed = 4;
  const ModelConfig config = Families()[0].second;
  const TinyModelFile file(config, /*mixed_types=*/false, kSeed);
  LoadedTinyModel loaded(file, CpuActivations::kInt8, DType::kBF16, kSeed);
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
  const auto before = WholePrefill(*loaded.runner, tokens);
  REQUIRE(loaded.model->Reserve(5, 5).ok());
  CHECK(WholePrefill(*loaded.runner, tokens) == before);
}

TEST_CASE("Loading reports progress up to the whole file, and what the weights take") {
  const TinyModelFile file(TinyConfig("llama"), /*mixed_types=*/true, /*seed=*/1);
  const auto ops = MakeCpuOps({.num_threads = 1});
  int64_t file_bytes = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    file_bytes += tensor.data.rows * RowBytes(tensor.data.type, tensor.data.cols);
  }
  int64_t last_done = 0, last_total = 0;
  const LoadOptions options = {.progress = [&](int64_t done, int64_t total) {
    CHECK(done > last_done);
    last_done = done;
    last_total = total;
  }};
  const auto model = Llama::Load(file, *ops, options);
  REQUIRE(model.ok());
  CHECK(last_done == file_bytes);
  CHECK(last_total == file_bytes);
  CHECK((*model)->weight_bytes() >= file_bytes);
}

TEST_CASE("A missing or misshapen tensor is an error that names it") {
  const auto ops = MakeCpuOps({.num_threads = 1});
  TinyModelFile file(TinyConfig("llama"), /*mixed_types=*/false, /*seed=*/1);
  auto& tensors = file.mutable_tensors();
  const auto tensor = std::find_if(tensors.begin(), tensors.end(), [](const TensorInfo& info) {
    return info.name == "blk.1.attn_k.weight";
  });
  REQUIRE(tensor != tensors.end());

  SECTION("of another shape") {
    tensor->shape = {64, 64};
    const auto model = Llama::Load(file, *ops, {});
    CHECK(model.status().code() == StatusCode::kInvalidArgument);
    CHECK(MessageOf(model.status()) ==
          "tiny: tensor 'blk.1.attn_k.weight' has shape [64, 64], expected [128, 64]");
  }
  SECTION("missing") {
    tensors.erase(tensor);
    const auto model = Llama::Load(file, *ops, {});
    CHECK(model.status().code() == StatusCode::kNotFound);
    CHECK_THAT(MessageOf(model.status()), Catch::Contains("blk.1.attn_k.weight"));
  }
}

}  // namespace
}  // namespace gloam
