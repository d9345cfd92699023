// A real model on the GPU, batch-invariant: 200 random mixes give the same bits as each request
// alone, with a bf16 cache and with fp8.
//
//   engine_cuda_test [MODEL]     (from the source folder; tests/models/named_model.h)
//
// Without a GPU or without the model it ends with 77: skipped.
#define CATCH_CONFIG_RUNNER
#include <memory>
#include <string>

#include "catch2/catch.hpp"
#include "fmt/format.h"
#include "tests/engine/fake_model.h"
#include "tests/engine/real_model_mixes.h"
#include "tests/models/named_model.h"

namespace gloam {
namespace {

constexpr int kSkipped = 77;  // what ctest is told (SKIP_RETURN_CODE)

NamedModel subject;  // of the command line

void CheckMixesWith(DType kv_dtype) {
  const std::unique_ptr<Ops> ops = MakeCudaOps({.batch_invariant = true}).value();
  LoadedModel loaded = LoadNamedModel(subject, *ops).value();
  if (loaded.tokenizer == nullptr) loaded.tokenizer = std::make_unique<testing::FakeTokenizer>();
  CheckMixes(loaded, *ops, subject.name, kv_dtype);
}

TEST_CASE("200 random mixes on the GPU give the same bits as each request alone") {
  CheckMixesWith(DType::kBF16);
}

TEST_CASE("200 random mixes on the GPU give the same bits with an fp8 cache") {
  CheckMixesWith(DType::kF8E4M3);
}

int Run(int argc, char** argv) {
  const auto named = FindNamedModel(argc > 1 ? argv[1] : "smollm2-135m-instruct");
  const auto ops = MakeCudaOps({});
  if (!named.ok() || !ops.ok()) {
    fmt::print("skipped: {}\n", MessageOf(named.ok() ? ops.status() : named.status()));
    return kSkipped;
  }
  subject = *named;
  return Catch::Session().run(1, argv);
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) { return gloam::Run(argc, argv); }
