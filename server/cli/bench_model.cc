#include "server/cli/bench_model.h"

#include <algorithm>
#include <cstdint>

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

void FillRandom(Ops& ops, DType dtype, void* data, size_t bytes, std::mt19937_64& random) {
  // Random numbers are slow to make: the same ones again and again.
  constexpr size_t kPieceBytes = size_t{32} << 20;
  constexpr size_t kNumRandom = size_t{1} << 19;
  const int below_two = dtype == DType::kF8E4M3 ? 0xbfbf : 0xbfff;
  std::vector<uint16_t> piece((std::min(bytes, kPieceBytes) + 1) / sizeof(uint16_t));
  for (size_t i = 0; i < piece.size(); ++i) {
    piece[i] = i < kNumRandom ? static_cast<uint16_t>(random()) & below_two : piece[i - kNumRandom];
  }
  for (size_t at = 0; at < bytes; at += kPieceBytes) {
    ops.Upload(static_cast<std::byte*>(data) + at, piece.data(), std::min(kPieceBytes, bytes - at));
  }
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace gloam
