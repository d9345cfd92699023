#include "server/cli/backend.h"

#include "base/check.h"
#include "base/logging.h"
#include "engine/kv_cache_pool.h"

namespace gloam {
namespace {

constexpr int kCpuBatchedTokens = 2048;
constexpr int kGpuBatchedTokens = 8192;
// Where nobody waits for a next token, long prompts are a little faster in longer chunks (32k
// tokens of an 8B on an H100: 1,170 ms instead of 1,177). Their activations take memory.
constexpr int kLargeGpuBatchedTokens = 16384;
constexpr int64_t kLargeGpuBytes = int64_t{64} << 30;

struct NamedDType {
  std::string_view name;
  DType dtype;
};
constexpr NamedDType kKvDTypes[] = {
    {"bf16", DType::kBF16}, {"f16", DType::kF16}, {"f32", DType::kF32}, {"fp8", DType::kF8E4M3}};

// The setting has been parsed: its name is known.
DType KvDTypeNamed(std::string_view name) {
  for (const NamedDType& known : kKvDTypes) {
    if (known.name == name) return known.dtype;
  }
  GLOAM_CHECK(!"a KV cache type of the options' list");
  return DType::kBF16;
}

// Errors: kInvalidArgument naming the setting that the device has no use for.
Status CheckDeviceSettings(const ServeOptions& options, Device device) {
  if (options.kv_cache_dtype != "auto") {
    GLOAM_RETURN_IF_ERROR(CheckKvDType(KvDTypeNamed(options.kv_cache_dtype), device));
  }
  if (device == Device::kCuda) return OkStatus();
  if (options.quantization == "fp8") return InvalidArgument("--quantization fp8 needs a GPU");
  if (options.dtype == "bfloat16") {
    return InvalidArgument("--dtype bfloat16 needs a GPU; the CPU has --activations");
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<Ops>> MakeOps(const ServeOptions& options) {
  if (options.device != "cpu") {
    auto gpu = MakeCudaOps(
        {.batch_invariant = options.batch_invariant, .fp8_weights = options.quantization == "fp8"});
    if (gpu.ok()) {
      SPDLOG_INFO("--device {}: {}", options.device, (*gpu)->DeviceName());
      return gpu;
    }
    if (options.device == "cuda") {
      return Status(gpu.status().code(), fmt::format("--device cuda: {}", MessageOf(gpu.status())));
    }
    SPDLOG_INFO("--device auto: the CPU, because: {}", MessageOf(gpu.status()));
  }
  return MakeCpuOps(
      {.num_threads = options.threads,
       .activations = options.activations == "f32" ? CpuActivations::kF32 : CpuActivations::kInt8});
}

}  // namespace

StatusOr<std::unique_ptr<Ops>> MakeBackend(const ServeOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(std::unique_ptr<Ops> ops, MakeOps(options));
  GLOAM_RETURN_IF_ERROR(CheckDeviceSettings(options, ops->device()));
  return ops;
}

DType KvDTypeOf(const ServeOptions& options, const ModelConfig& config) {
  return options.kv_cache_dtype == "auto" ? DefaultKvDType(config)
                                          : KvDTypeNamed(options.kv_cache_dtype);
}

std::string_view KvDTypeName(DType dtype) {
  for (const NamedDType& known : kKvDTypes) {
    if (known.dtype == dtype) return known.name;
  }
  GLOAM_CHECK(!"a KV cache type");
  return {};
}

BatchedTokens BatchedTokensOf(const ServeOptions& options, const Ops& ops) {
  if (options.max_num_batched_tokens > 0) {
    return {options.max_num_batched_tokens, options.max_num_batched_tokens};
  }
  if (ops.device() != Device::kCuda) return {kCpuBatchedTokens, kCpuBatchedTokens};
  const bool is_large = ops.memory().total_bytes >= kLargeGpuBytes;
  return {is_large ? kLargeGpuBatchedTokens : kGpuBatchedTokens, kGpuBatchedTokens};
}

}  // namespace gloam
