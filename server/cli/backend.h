// From settings to a backend, and what they mean on it. Pure but for MakeBackend.
#pragma once

#include <memory>
#include <string_view>

#include "base/status.h"
#include "kernels/ops.h"
#include "models/model_config.h"
#include "server/cli/options.h"

namespace gloam {

// The backend of --device. "auto": a GPU where one can be used, else the CPU, with a line in the
// log. Errors: as MakeCudaOps for "cuda"; kInvalidArgument naming a setting that the device has no
// use for.
[[nodiscard]] StatusOr<std::unique_ptr<Ops>> MakeBackend(const ServeOptions& options);

// Type of the KV cache, --kv-cache-dtype auto resolved for the model; and its name there.
DType KvDTypeOf(const ServeOptions& options, const ModelConfig& config);
std::string_view KvDTypeName(DType dtype);

// Tokens of a step at most, and of one in which a sequence decodes: --max-num-batched-tokens, or
// what suits the device.
struct BatchedTokens {
  int max = 0;
  int beside_decode = 0;
};
BatchedTokens BatchedTokensOf(const ServeOptions& options, const Ops& ops);

}  // namespace gloam
