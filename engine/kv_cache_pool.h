// KvCachePool: owns all KV memory, one array per layer. And the plan of how large it gets.
// Made at start-up; the engine thread's steps read and write it through the views.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "kernels/ops.h"
#include "models/model_config.h"

namespace gloam {

struct KvPlan {
  KvLayout layout;
  int64_t num_blocks = 0;
  int64_t bytes_per_block = 0;  // over all layers
  int max_model_len = 0;        // tokens of one request, prompt and answer

  int64_t num_tokens() const { return num_blocks * kBlockTokens; }
};

// How many blocks, and how long one request may get. A context that the user did not ask for is
// lowered to what fits, with a line in the log. Errors: kInvalidArgument naming the flag,
// kResourceExhausted saying what would fit.
[[nodiscard]] StatusOr<KvPlan> PlanKvCache(const EngineOptions& options, const ModelConfig& config);

class KvCachePool {
 public:
  // `ops` must outlive the pool. Errors: kResourceExhausted.
  [[nodiscard]] static StatusOr<KvCachePool> Create(Ops& ops, const KvPlan& plan, int num_layers);

  std::span<const KvLayerView> layers() const { return layers_; }

 private:
  KvCachePool() = default;

  std::vector<Buffer> buffers_;      // [num_layers]
  std::vector<KvLayerView> layers_;  // [num_layers]
};

}  // namespace gloam
