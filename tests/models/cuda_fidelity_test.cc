// A model on the GPU against the same model on the CPU with fp32 activations and an fp32 cache:
// log-probabilities of given text, and greedy continuations; once more with an fp8 cache. And,
// where there is a golden file, against `transformers`.
//
//   cuda_fidelity_test [MODEL]     (from the source folder; tests/models/named_model.h)
//
// Without a GPU or without the model it ends with 77: skipped.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "tests/models/fidelity.h"
#include "tests/models/named_model.h"

namespace gloam {
namespace {

constexpr int kSkipped = 77;  // what ctest is told (SKIP_RETURN_CODE)
constexpr size_t kNumTexts = 16;
constexpr size_t kTextTokens = 160;
constexpr int kGenerated = 32;
// The bounds that the project promises; the second with an fp8 cache, of models that suit it.
constexpr double kMaxMeanDifference = 0.02;
constexpr double kMaxFp8Difference = 0.12;  // SmolLM2 on an H100: 0.069
// The reference's margin above which the most likely token must be the same: two tokens that move
// by twice the bf16 rounding of a logit of 30 each.
constexpr double kNoise = 0.25;

// The beginnings of the golden file's texts, or tokens at random where there is none.
std::vector<std::vector<int32_t>> Texts(const std::string& golden_file, int vocab_size) {
  std::vector<std::vector<int32_t>> texts;
  if (const auto goldens = ReadLogitGoldens(golden_file); goldens.ok()) {
    for (const GoldenPrompt& prompt : *goldens) {
      texts.push_back(prompt.token_ids);
      if (texts.size() == kNumTexts) break;
    }
  }
  std::mt19937 random(3);
  while (texts.size() < kNumTexts) {
    std::vector<int32_t>& text = texts.emplace_back(kTextTokens);
    for (int32_t& token : text) token = static_cast<int32_t>(random() % vocab_size);
  }
  for (std::vector<int32_t>& text : texts) text.resize(std::min(text.size(), kTextTokens));
  return texts;
}

FidelityStats Total(const std::vector<FidelityStats>& parts, const char* reference) {
  FidelityStats total;
  for (const FidelityStats& stats : parts) total.Add(stats);
  fmt::print(
      "against {}: {} rows, mean |difference| {:.5f}, largest {:.4f}, d NLL {:.5f}; {} rows with a "
      "clear margin, {} disagree; largest margin lost {:.4f}\n",
      reference, total.num_rows, total.mean_difference(), total.max_difference,
      total.nll_difference(), total.num_clear, total.num_disagree, total.max_margin_lost);
  return total;
}

int Run(const std::string& argument) {
  const auto named = FindNamedModel(argument);
  auto gpu = MakeCudaOps({});
  if (!named.ok() || !gpu.ok()) {
    fmt::print("skipped: {}\n", MessageOf(named.ok() ? gpu.status() : named.status()));
    return kSkipped;
  }
  const std::string golden_file = "tests/goldens/logits_" + named->name + ".json";
  const auto on_gpu = LoadNamedModel(*named, **gpu);
  const auto cpu = MakeCpuOps({.activations = CpuActivations::kF32});
  const auto on_cpu = LoadNamedModel(*named, *cpu);
  if (!on_gpu.ok() || !on_cpu.ok()) {
    fmt::print("{}\n", MessageOf(on_gpu.ok() ? on_cpu.status() : on_gpu.status()));
    return 1;
  }
  const ModelConfig& config = on_cpu->model->config();
  const DType kv_dtype = DefaultKvDType(config);
  fmt::print("{} on {}\n", named->name, (*gpu)->DeviceName());
  const std::vector<GoldenPrompt> reference = MakeReference(
      *on_cpu->model, *cpu, DType::kF32, Texts(golden_file, config.vocab_size), kGenerated);
  const FidelityStats total =
      Total(MeasureFidelity(*on_gpu->model, **gpu, kv_dtype, reference, kNoise), "the CPU in fp32");
  if (const auto goldens = ReadLogitGoldens(golden_file); goldens.ok()) {
    Total(MeasureFidelity(*on_gpu->model, **gpu, kv_dtype, *goldens, kNoise), "transformers");
  }
  const FidelityStats fp8 =
      Total(MeasureFidelity(*on_gpu->model, **gpu, DType::kF8E4M3, reference, kNoise),
            "the CPU in fp32, with an fp8 cache");
  const bool good = total.mean_difference() <= kMaxMeanDifference && total.num_disagree == 0 &&
                    total.num_rows > 0 && total.num_clear > 0 &&
                    (fp8.mean_difference() <= kMaxFp8Difference || !SuitsFp8Kv(config));
  fmt::print("{}\n", good ? "passed" : "FAILED");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) { return gloam::Run(argc > 1 ? argv[1] : "smollm2-135m-instruct"); }
