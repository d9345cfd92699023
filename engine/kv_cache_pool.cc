#include "engine/kv_cache_pool.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "base/logging.h"
#include "engine/block_manager.h"

namespace gloam {
namespace {

double MiB(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

// What to do about a cache that is smaller than `bytes_needed`, as the end of a sentence.
std::string HowToGetRoom(int64_t bytes_needed, const MemoryPlan* memory) {
  if (memory == nullptr) return fmt::format("raise --kv-cache-memory to {}", bytes_needed);
  if (const auto utilization = memory->UtilizationFor(bytes_needed)) {
    return fmt::format("raise --gpu-memory-utilization to {:.2f}", *utilization);
  }
  return "lower --max-num-batched-tokens or --max-num-seqs, take smaller weights";
}

Status NoRoomAtAll(const KvPlan& plan, int64_t cache_bytes, const MemoryPlan* memory) {
  if (memory == nullptr) {
    return ResourceExhausted(
        "a KV cache of {} bytes holds no block: one block of {} tokens takes {} bytes", cache_bytes,
        kBlockTokens, plan.bytes_per_block);
  }
  return ResourceExhausted(
      "no room for a KV cache: of the GPU's {:.2f} GB, --gpu-memory-utilization {:.2f} allows "
      "{:.2f} GB, but {}: {}",
      static_cast<double>(memory->total_bytes) / 1e9, memory->utilization,
      static_cast<double>(memory->usable_bytes()) / 1e9, memory->Others(),
      HowToGetRoom(plan.bytes_per_block, memory));
}

}  // namespace

Status CheckKvDType(DType dtype, Device device) {
  if (IsKvDType(dtype, device)) return OkStatus();
  if (device == Device::kCuda) {
    return InvalidArgument("--kv-cache-dtype: on a GPU the KV cache holds bf16, f16 or fp8");
  }
  return InvalidArgument("--kv-cache-dtype: on the CPU the KV cache holds bf16, f16 or f32{}",
                         dtype == DType::kF8E4M3 ? "; fp8 needs a GPU" : "");
}

StatusOr<int> WantedModelLen(const EngineOptions& options, const ModelConfig& config) {
  if (options.max_model_len < 0 || options.max_model_len > config.max_position) {
    return InvalidArgument("--max-model-len {} is not in [1, {}], the context of this model",
                           options.max_model_len, config.max_position);
  }
  return options.max_model_len > 0 ? options.max_model_len : config.max_position;
}

StatusOr<KvPlan> PlanKvCache(const EngineOptions& options, const ModelConfig& config,
                             const MemoryPlan* memory) {
  GLOAM_RETURN_IF_ERROR(
      CheckKvDType(options.kv_cache_dtype, memory == nullptr ? Device::kCpu : Device::kCuda));
  KvPlan plan;
  GLOAM_ASSIGN_OR_RETURN(plan.max_model_len, WantedModelLen(options, config));
  plan.layout = {.dtype = options.kv_cache_dtype,
                 .num_kv_heads = config.num_kv_heads,
                 .head_dim = config.head_dim};
  plan.sidecars = options.sidecars;
  plan.sidecar_bytes_per_block = config.num_layers * SidecarBlockBytes(plan.sidecars, plan.layout);
  plan.bytes_per_block =
      config.num_layers * plan.layout.block_bytes() + plan.sidecar_bytes_per_block;

  const bool from_memory = memory != nullptr && options.kv_cache_bytes == 0;
  const int64_t cache_bytes = from_memory ? memory->room_bytes() : options.kv_cache_bytes;
  plan.num_blocks =
      options.num_kv_blocks > 0 ? options.num_kv_blocks : cache_bytes / plan.bytes_per_block;
  plan.num_blocks = std::min<int64_t>(plan.num_blocks, std::numeric_limits<int32_t>::max());
  const MemoryPlan* source = from_memory ? memory : nullptr;
  if (plan.num_blocks < 1) return NoRoomAtAll(plan, cache_bytes, source);
  if (plan.max_model_len <= plan.num_tokens()) return plan;

  const int64_t bytes_needed = BlocksFor(plan.max_model_len) * plan.bytes_per_block;
  const double mib_available = MiB(plan.num_blocks * plan.bytes_per_block);
  if (options.max_model_len > 0) {
    return ResourceExhausted(
        "--max-model-len {} needs {:.1f} MiB of KV cache, but there are {:.1f} MiB{}: {}, or lower "
        "--max-model-len to {}",
        plan.max_model_len, MiB(bytes_needed), mib_available,
        source == nullptr ? "" : fmt::format(" ({})", source->Others()),
        HowToGetRoom(bytes_needed, source), plan.num_tokens());
  }
  spdlog::warn(
      "the model's context of {} tokens needs {:.1f} MiB of KV cache, but there are {:.1f} MiB: "
      "requests are limited to {} tokens",
      plan.max_model_len, MiB(bytes_needed), mib_available, plan.num_tokens());
  plan.max_model_len = static_cast<int>(plan.num_tokens());
  return plan;
}

StatusOr<KvCachePool> KvCachePool::Create(Ops& ops, const KvPlan& plan, int num_layers) {
  KvCachePool pool;
  for (int layer = 0; layer < num_layers; ++layer) {
    GLOAM_ASSIGN_OR_RETURN(
        Buffer buffer,
        ops.Allocate(static_cast<size_t>(plan.num_blocks * plan.layout.block_bytes())));
    pool.layers_.push_back(
        {.data = buffer.data(), .layout = plan.layout, .num_blocks = plan.num_blocks});
    pool.buffers_.push_back(std::move(buffer));
  }
  if (!plan.sidecars.empty()) GLOAM_RETURN_IF_ERROR(pool.AddSidecars(ops, plan));
  return pool;
}

Status KvCachePool::AddSidecars(Ops& ops, const KvPlan& plan) {
  sidecar_config_ = std::make_unique<const SidecarConfig>(plan.sidecars);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    SidecarLayerView view;
    view.config = sidecar_config_.get();
    view.num_kv_heads = plan.layout.num_kv_heads;
    view.num_blocks = plan.num_blocks;
    for (int kind = 0; kind < kNumSidecarKinds; ++kind) {
      view.head_bytes[kind] =
          SidecarBytes(static_cast<SidecarKind>(kind), plan.sidecars, plan.layout);
      if (view.head_bytes[kind] == 0) continue;
      GLOAM_ASSIGN_OR_RETURN(Buffer buffer,
                             ops.Allocate(static_cast<size_t>(plan.num_blocks * view.num_kv_heads *
                                                              view.head_bytes[kind])));
      view.data[kind] = static_cast<std::byte*>(buffer.data());
      buffers_.push_back(std::move(buffer));
    }
    sidecar_layers_.push_back(view);
  }
  return OkStatus();
}

}  // namespace gloam
