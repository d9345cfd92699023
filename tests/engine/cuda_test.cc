// A real model on the GPU, batch-invariant: 200 random mixes give the same bits as each request
// alone.
//
//   engine_cuda_test [MODEL]     (from the source folder; a file, a folder, or a catalogue name)
//
// Without a GPU or without the model it ends with 77: skipped.
#define CATCH_CONFIG_RUNNER
#include <filesystem>
#include <memory>
#include <string>

#include "catch2/catch.hpp"
#include "fmt/format.h"
#include "tests/engine/real_model_mixes.h"
#include "tests/models/catalogue_model.h"

namespace gloam {
namespace {

constexpr int kSkipped = 77;  // what ctest is told (SKIP_RETURN_CODE)

// Of the command line.
struct Subject {
  std::filesystem::path path;
  std::string name;
};
Subject subject;

TEST_CASE("200 random mixes on the GPU give the same bits as each request alone") {
  const std::unique_ptr<Ops> ops = MakeCudaOps({.batch_invariant = true}).value();
  const LoadedModel loaded = LoadModel(subject.path, *ops, {}).value();
  CheckMixes(loaded, *ops, subject.name);
}

int Run(int argc, char** argv) {
  const std::string model = argc > 1 ? argv[1] : "smollm2-135m-instruct";
  subject = {.path = model, .name = model};
  if (std::filesystem::exists(subject.path)) {
    subject.name = subject.path.stem().string();
  } else {
    subject.path = CatalogueModelPath(model);
  }
  if (!std::filesystem::exists(subject.path)) {
    fmt::print("skipped: no {}; fetch it with: gloam pull {}\n", subject.path.string(), model);
    return kSkipped;
  }
  if (const auto ops = MakeCudaOps({}); !ops.ok()) {
    fmt::print("skipped: {}\n", MessageOf(ops.status()));
    return kSkipped;
  }
  return Catch::Session().run(1, argv);
}

}  // namespace
}  // namespace gloam

int main(int argc, char** argv) { return gloam::Run(argc, argv); }
