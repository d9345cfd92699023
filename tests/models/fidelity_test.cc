// The chain of trust's first link: catalogue models against `transformers` in fp32, on text, code,
// many scripts, chats and 2k-token inputs. The bounds are those that the project promises.
#include "tests/models/fidelity.h"

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "tests/models/catalogue_model.h"

namespace gloam {
namespace {

struct Mode {
  CpuActivations activations;
  double max_mean_difference;  // of the log-probability of the next token
  double max_nll_difference;
  // The reference's margin above which the most likely token must be the same: two tokens that each
  // move by the largest difference seen (1e-4, and about 0.5).
  double noise;
};

constexpr Mode kExact = {CpuActivations::kF32, 0.003, 0.003, 0.01};
constexpr Mode kFast = {CpuActivations::kInt8, 0.07, 0.02, 1.0};

// Takes every `stride`-th prompt: fp32 products are slow. bench/fidelity takes all.
void CheckFidelity(const std::string& name, const Mode& mode, int stride = 1) {
  const std::filesystem::path path = CatalogueModelPath(name);
  if (!std::filesystem::exists(path)) {
    WARN("skipped: no " << path << "; fetch it with: gloam pull " << name);
    return;
  }
  const auto goldens = ReadLogitGoldens("tests/goldens/logits_" + name + ".json");
  INFO(goldens.status());
  REQUIRE(goldens.ok());
  REQUIRE(goldens->size() >= 40);
  std::vector<GoldenPrompt> prompts;
  for (size_t i = 0; i < goldens->size(); i += stride) prompts.push_back((*goldens)[i]);

  const auto ops = MakeCpuOps({.activations = mode.activations});
  const auto loaded = LoadModel(path, *ops, {});
  INFO(loaded.status());
  REQUIRE(loaded.ok());
  const DType kv_dtype = mode.activations == CpuActivations::kF32
                             ? DType::kF32
                             : DefaultKvDType(loaded->model->config());
  FidelityStats total;
  for (const FidelityStats& stats :
       MeasureFidelity(*loaded->model, *ops, kv_dtype, prompts, mode.noise)) {
    total.Add(stats);
  }
  CAPTURE(total.num_rows, total.max_difference, total.num_clear, total.max_margin_lost);
  CHECK(total.num_rows > 500);
  CHECK(total.mean_difference() <= mode.max_mean_difference);
  CHECK(std::abs(total.nll_difference()) <= mode.max_nll_difference);
  CHECK(total.num_disagree == 0);
}

TEST_CASE("SmolLM2 with fp32 activations") {
  CheckFidelity("smollm2-135m-instruct", kExact, /*stride=*/2);
}
TEST_CASE("SmolLM2 in the default mode") { CheckFidelity("smollm2-135m-instruct", kFast); }
TEST_CASE("Qwen2.5-Coder with fp32 activations") {
  CheckFidelity("qwen2.5-coder-0.5b-instruct", kExact, /*stride=*/3);
}
TEST_CASE("Qwen2.5-Coder in the default mode") {
  CheckFidelity("qwen2.5-coder-0.5b-instruct", kFast);
}

}  // namespace
}  // namespace gloam
