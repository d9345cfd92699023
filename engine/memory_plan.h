// MemoryPlan: what a GPU's memory is used for. Made at start-up, when weights and workspaces are
// there and the KV cache gets what --gpu-memory-utilization leaves; then immutable.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/ops.h"

namespace gloam {

struct MemoryPlan {
  double utilization = 0;       // the share of total_bytes that this process may bring into use
  int64_t total_bytes = 0;      // of the device
  int64_t other_bytes = 0;      // in use beside the model: the driver's context, other programs
  int64_t weight_bytes = 0;     // in memory already, as the next one
  int64_t workspace_bytes = 0;  // activations, scratch of operations
  int64_t graph_bytes = 0;      // set aside for recorded steps and the kernels they load
  int64_t kv_bytes = 0;         // keys and values
  int64_t sidecar_bytes = 0;

  int64_t usable_bytes() const {
    return static_cast<int64_t>(utilization * static_cast<double>(total_bytes));
  }
  // For the KV cache and its sidecars; below 0 where the rest takes too much already.
  int64_t room_bytes() const {
    return usable_bytes() - other_bytes - weight_bytes - workspace_bytes - graph_bytes;
  }
  // The least utilization, in hundredths, that has room for so many bytes of cache; empty where
  // that is not below 1.
  std::optional<double> UtilizationFor(int64_t cache_bytes) const;

  // "weights 16.1 GB, workspaces 1.2 GB, ...": what lies beside the cache.
  std::string Others() const;
  // Lines of the start-up banner, each indented by `indent` spaces.
  std::string Table(int indent) const;
};

// `before_workspaces`: the memory when only the weights were there, `now`: with workspaces.
MemoryPlan PlanMemory(double utilization, int64_t weight_bytes,
                      const DeviceMemory& before_workspaces, const DeviceMemory& now);

}  // namespace gloam
