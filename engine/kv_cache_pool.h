// KvCachePool: owns all KV memory, per layer one array of keys and values and one of each kind of
// sidecar. And the plan of how large it gets.
// Made at start-up; the engine thread's steps read and write it through the views.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "engine/memory_plan.h"
#include "kernels/ops.h"
#include "models/model_config.h"

namespace gloam {

struct KvPlan {
  KvLayout layout;
  SidecarConfig sidecars;
  int64_t num_blocks = 0;
  int64_t bytes_per_block = 0;  // over all layers, sidecars included
  int64_t sidecar_bytes_per_block = 0;
  int max_model_len = 0;  // tokens of one request, prompt and answer

  int64_t num_tokens() const { return num_blocks * kBlockTokens; }
};

// Whether the cache on `device` may hold elements of `dtype`. Errors: kInvalidArgument naming the
// flag.
[[nodiscard]] Status CheckKvDType(DType dtype, Device device);

// How long a request may get before memory is considered. Errors: kInvalidArgument naming the flag.
[[nodiscard]] StatusOr<int> WantedModelLen(const EngineOptions& options, const ModelConfig& config);

// How many blocks, and how long one request may get. A context that the user did not ask for is
// lowered to what fits, with a line in the log. `memory`: the GPU's, which then says how much there
// is for the cache where the options do not; null: the CPU's. Errors: kInvalidArgument naming the
// flag, kResourceExhausted saying what would fit.
[[nodiscard]] StatusOr<KvPlan> PlanKvCache(const EngineOptions& options, const ModelConfig& config,
                                           const MemoryPlan* memory = nullptr);

class KvCachePool {
 public:
  // `ops` must outlive the pool. Errors: kResourceExhausted.
  [[nodiscard]] static StatusOr<KvCachePool> Create(Ops& ops, const KvPlan& plan, int num_layers);

  std::span<const KvLayerView> layers() const { return layers_; }
  // [num_layers], or empty when no sidecars are kept.
  std::span<const SidecarLayerView> sidecars() const { return sidecar_layers_; }

 private:
  KvCachePool() = default;

  [[nodiscard]] Status AddSidecars(Ops& ops, const KvPlan& plan);

  std::unique_ptr<const SidecarConfig> sidecar_config_;  // the views point to it
  std::vector<Buffer> buffers_;
  std::vector<KvLayerView> layers_;               // [num_layers]
  std::vector<SidecarLayerView> sidecar_layers_;  // [num_layers] or empty
};

}  // namespace gloam
