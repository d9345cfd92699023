#include "server/cli/bench_model.h"

#include <algorithm>

#include "models/catalog.h"
#include "models/random_model_file.h"

namespace gloam {

StatusOr<std::unique_ptr<ModelFile>> OpenBenchModel(const BenchModelOptions& options) {
  if (!options.random_weights.empty()) {
    return RandomModelFile::Create(options.random_weights, options.random_weight_type);
  }
  if (options.name.empty()) return InvalidArgument("a MODEL or --random-weights is needed");
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(options.name));
  return ModelFile::Open(resolved.path);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace gloam
