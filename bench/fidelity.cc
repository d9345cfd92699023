// fidelity: how far each catalogue model is from `transformers` in fp32, per golden prompt and in
// all, with fp32 activations and in the default mode. The same measurement as
// tests/models/fidelity_test.cc, which holds it to its bounds.
//
//   fidelity [MODEL...] [--threads N] [--prompts]      (from the source folder)
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "tests/models/catalogue_model.h"
#include "tests/models/fidelity.h"

namespace gloam {
namespace {

struct FidelityOptions {
  std::vector<std::string> models = {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"};
  int threads = 0;
  bool prompts = false;
  double noise = 0.0;
};

void PrintRow(const std::string& name, const FidelityStats& stats) {
  fmt::print("  {:<22} {:>6} {:>9.5f} {:>9.5f} {:>9.5f} {:>6} {:>9} {:>9.4f}\n", name,
             stats.num_rows, stats.mean_difference(), stats.max_difference, stats.nll_difference(),
             stats.num_clear, stats.num_disagree, stats.max_margin_lost);
}

Status Measure(const std::string& name, CpuActivations activations,
               const FidelityOptions& options) {
  const bool exact = activations == CpuActivations::kF32;
  GLOAM_ASSIGN_OR_RETURN(const auto prompts,
                         ReadLogitGoldens("tests/goldens/logits_" + name + ".json"));
  const auto ops = MakeCpuOps({.num_threads = options.threads, .activations = activations});
  GLOAM_ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModel(CatalogueModelPath(name), *ops, {}));
  const DType kv_dtype = exact ? DType::kF32 : DefaultKvDType(loaded.model->config());
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<FidelityStats> results =
      MeasureFidelity(*loaded.model, *ops, kv_dtype, prompts, options.noise);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;

  fmt::print("{}, {} ({:.1f} s)\n", name,
             exact ? "fp32 activations, fp32 KV" : "int8 activations, 16-bit KV", elapsed.count());
  fmt::print("  {:<22} {:>6} {:>9} {:>9} {:>9} {:>6} {:>9} {:>9}\n", "prompt", "rows", "mean |d|",
             "max |d|", "d NLL", "clear", "disagree", "margin");
  FidelityStats total;
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (options.prompts) PrintRow(prompts[i].name, results[i]);
    total.Add(results[i]);
  }
  PrintRow("all", total);
  std::fflush(stdout);
  return OkStatus();
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) {
  gloam::FidelityOptions options;
  CLI::App app("Distance of log-probabilities from the reference");
  app.add_option("models", options.models, "names in models/catalog.json");
  app.add_option("--threads", options.threads, "0: one per core");
  app.add_flag("--prompts", options.prompts, "also print a line per prompt");
  app.add_option(
      "--noise", options.noise,
      "reference margin from which a different most likely token counts as disagreement");
  CLI11_PARSE(app, argc, argv);
  for (const std::string& model : options.models) {
    for (const auto activations : {gloam::CpuActivations::kF32, gloam::CpuActivations::kInt8}) {
      const gloam::Status status = gloam::Measure(model, activations, options);
      if (!status.ok()) {
        fmt::print(stderr, "{}\n", gloam::MessageOf(status));
        return 1;
      }
    }
  }
  return 0;
}
