// What the benches of a model's parts share.
#pragma once

#include <memory>
#include <vector>

#include "base/status.h"
#include "models/model_file.h"
#include "server/cli/cli.h"

namespace gloam {

// The model that the options name, or one of random weights. Errors: kInvalidArgument (neither is
// named, or no such shape or type), as ResolveModel and ModelFile::Open.
[[nodiscard]] StatusOr<std::unique_ptr<ModelFile>> OpenBenchModel(const BenchModelOptions& options);

// Of one value at least; the upper of two in the middle.
double Median(std::vector<double> values);

}  // namespace gloam
