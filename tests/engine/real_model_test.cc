// The real SmolLM2 on the CPU backend.
#include <filesystem>

#include "catch2/catch.hpp"
#include "tests/engine/real_model_mixes.h"
#include "tests/models/catalogue_model.h"

namespace gloam {
namespace {

TEST_CASE("200 random mixes of a real model give the same bits as each request alone") {
  const auto path = CatalogueModelPath("smollm2-135m-instruct");
  if (!std::filesystem::exists(path)) {
    WARN("skipped: " << path << " is not there; `gloam pull smollm2-135m-instruct` fetches it");
    return;
  }
  const std::unique_ptr<Ops> ops = MakeCpuOps({});
  const LoadedModel loaded = LoadModel(path, *ops, {}).value();
  CheckMixes(loaded, *ops, "smollm2-135m-instruct", DType::kBF16);
}

}  // namespace
}  // namespace gloam
