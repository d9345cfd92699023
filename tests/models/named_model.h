// A model as test programs take it from their command line: a file, a folder, a name of the
// catalogue, or random weights of a known shape ("random:smollm2-135m:q4_0").
#pragma once

#include <filesystem>
#include <string>

#include "base/status.h"
#include "models/model.h"

namespace gloam {

struct NamedModel {
  std::string name;            // as golden files call it
  std::filesystem::path path;  // empty: random weights
  std::string shape;
  std::string weight_type;
};

// Errors: kNotFound saying how to fetch it.
[[nodiscard]] StatusOr<NamedModel> FindNamedModel(const std::string& argument);

// Random weights come without a tokenizer. Errors: those of LoadModel and RandomModelFile.
[[nodiscard]] StatusOr<LoadedModel> LoadNamedModel(const NamedModel& named, Ops& ops);

}  // namespace gloam
