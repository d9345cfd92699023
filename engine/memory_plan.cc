#include "engine/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "fmt/format.h"

namespace gloam {
namespace {

// For recorded steps, of which there is one for each size of batch, and for kernels, which the
// driver loads when they are first needed.
constexpr int64_t kGraphBytes = int64_t{256} << 20;

double GB(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

}  // namespace

std::optional<double> MemoryPlan::UtilizationFor(int64_t cache_bytes) const {
  const int64_t needed = other_bytes + weight_bytes + workspace_bytes + graph_bytes + cache_bytes;
  const double share =
      std::ceil(100.0 * static_cast<double>(needed) / static_cast<double>(total_bytes)) / 100.0;
  return share < 1.0 ? std::optional(share) : std::nullopt;
}

std::string MemoryPlan::Others() const {
  return fmt::format(
      "weights take {:.2f} GB, workspaces {:.2f} GB, recorded steps {:.2f} GB, other uses {:.2f} "
      "GB",
      GB(weight_bytes), GB(workspace_bytes), GB(graph_bytes), GB(other_bytes));
}

std::string MemoryPlan::Table(int indent) const {
  const std::pair<const char*, int64_t> rows[] = {
      {"weights", weight_bytes}, {"workspaces", workspace_bytes}, {"recorded steps", graph_bytes},
      {"KV cache", kv_bytes},    {"sidecars", sidecar_bytes},     {"other uses", other_bytes}};
  std::string table;
  int64_t planned = 0;
  for (const auto& [name, bytes] : rows) {
    table += fmt::format("{:{}}{:<16}{:>8.2f} GB\n", "", indent, name, GB(bytes));
    planned += bytes;
  }
  table += fmt::format("{:{}}{:<16}{:>8.2f} GB of {:.2f}, {:.0f} % may be used\n", "", indent,
                       "in all", GB(planned), GB(total_bytes), 100 * utilization);
  return table;
}

MemoryPlan PlanMemory(double utilization, int64_t weight_bytes,
                      const DeviceMemory& before_workspaces, const DeviceMemory& now) {
  MemoryPlan plan;
  plan.utilization = utilization;
  plan.total_bytes = now.total_bytes;
  plan.weight_bytes = weight_bytes;
  plan.workspace_bytes = std::max<int64_t>(0, before_workspaces.free_bytes - now.free_bytes);
  plan.other_bytes =
      std::max<int64_t>(0, now.total_bytes - before_workspaces.free_bytes - weight_bytes);
  plan.graph_bytes = kGraphBytes;
  return plan;
}

}  // namespace gloam
