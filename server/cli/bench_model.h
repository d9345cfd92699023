// What the benches of a model's parts share.
#pragma once

#include <cstddef>
#include <memory>
#include <random>
#include <vector>

#include "base/status.h"
#include "kernels/ops.h"
#include "models/model_file.h"
#include "server/cli/cli.h"

namespace gloam {

// The model that the options name, or one of random weights. Errors: kInvalidArgument (neither is
// named, or no such shape or type), as ResolveModel and ModelFile::Open.
[[nodiscard]] StatusOr<std::unique_ptr<ModelFile>> OpenBenchModel(const BenchModelOptions& options);

// Fills a device's memory with bf16, fp16 or e4m3 values of magnitude below 2, of either sign:
// zeros would make attention flat and cost a device less power than data does.
void FillRandom(Ops& ops, DType dtype, void* data, size_t bytes, std::mt19937_64& random);

// Of one value at least; the upper of two in the middle.
double Median(std::vector<double> values);

}  // namespace gloam
