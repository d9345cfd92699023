// The CUDA backend's Ops: one object that owns the stream, the recorded steps and each operation's
// scratch memory, and forwards to cuda_kernels.h.
#include <cuda_runtime_api.h>

#include <string>

#include "absl/container/flat_hash_map.h"
#include "base/check.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kept_memory.h"

namespace gloam {
namespace {

using cuda::DeviceContext;

// A step recorded as a CUDA graph. Move-only.
class Recording {
 public:
  Recording() = default;
  explicit Recording(cudaGraphExec_t graph) : graph_(graph) {}
  Recording(Recording&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  Recording& operator=(Recording&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~Recording() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  bool empty() const { return graph_ == nullptr; }
  void Launch(cudaStream_t stream) const { GLOAM_CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

Recording Record(cudaStream_t stream, const std::function<void()>& step) {
  GLOAM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  step();
  cudaGraph_t graph = nullptr;
  GLOAM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  GLOAM_CUDA_CHECK(error);
  return Recording(executable);
}

class CudaOps final : public Ops {
 public:
  CudaOps(const CudaOptions& options, const cudaDeviceProp& properties)
      : name_(properties.name),
        context_({.options = options,
                  .stream = stream_.get(),
                  .num_sms = properties.multiProcessorCount,
                  .compute_capability = 10 * properties.major + properties.minor,
                  .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
                  .l2_bytes = properties.l2CacheSize}),
        gemm_(cuda::MakeGemmBackend(context_)),
        attention_(cuda::MakeAttentionBackend(context_)),
        sample_(cuda::MakeSampleBackend(context_)) {}

  Device device() const override { return Device::kCuda; }
  std::string DeviceName() const override { return name_; }
  ActivationDTypes activation_dtypes() const override {
    return {.residual = DType::kF32, .input = DType::kBF16, .qkv = DType::kBF16};
  }
  DType QueryDType(DType kv) const override { return cuda::QueryDType(kv); }
  DeviceMemory memory() const override {
    size_t free_bytes = 0, total_bytes = 0;
    GLOAM_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    return {.free_bytes = static_cast<int64_t>(free_bytes),
            .total_bytes = static_cast<int64_t>(total_bytes)};
  }
  double MeasureReadRate() override { return cuda::MeasureReadRate(context_); }

  StatusOr<Buffer> Allocate(size_t bytes) override { return cuda::AllocateDevice(bytes); }
  StatusOr<StagedBuffer> AllocateStaged(size_t bytes) override {
    StagedBuffer staged;
    GLOAM_ASSIGN_OR_RETURN(staged.host, cuda::AllocatePinned(bytes));
    GLOAM_ASSIGN_OR_RETURN(staged.device, cuda::AllocateDevice(bytes));
    return staged;
  }
  Status Reserve(const StepLimits& limits) override {
    recordings_.clear();  // they hold pointers to the old scratch memory
    GLOAM_RETURN_IF_ERROR(gemm_->Reserve(limits));
    GLOAM_RETURN_IF_ERROR(attention_->Reserve(limits));
    return sample_->Reserve(limits);
  }

  void Upload(void* device, const void* host, size_t bytes) override {
    GLOAM_CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, context_.stream));
    GLOAM_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  }
  void Download(void* host, const void* device, size_t bytes) override {
    GLOAM_CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, context_.stream));
    GLOAM_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  }

  void BeginStep() override { GLOAM_CUDA_CHECK(cudaEventSynchronize(staged_.get())); }
  void Stage(const StagedBuffer& buffer, size_t offset, size_t bytes) override {
    GLOAM_CHECK(offset + bytes <= buffer.host.bytes());
    cuda::CopyFromPinned(static_cast<const std::byte*>(buffer.host.data()) + offset,
                         static_cast<std::byte*>(buffer.device.data()) + offset, bytes, context_);
    GLOAM_CUDA_CHECK(cudaEventRecord(staged_.get(), context_.stream));
  }

  void KeepInCache(void* data, size_t bytes) override { kept_ = cuda::KeptMemory(data, bytes); }

  // The first run of a key loads kernels and picks algorithms, the second is recorded.
  void Repeat(uint64_t key, const std::function<void()>& step) override {
    const auto [it, is_new] = recordings_.try_emplace(key);
    if (is_new) return step();
    if (it->second.empty()) {
      kept_.Open(context_.stream);
      it->second = Record(context_.stream, step);
      kept_.Close(context_.stream);
    }
    it->second.Launch(context_.stream);
  }

  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight> parts) override {
    return gemm_->LoadWeight(parts);
  }
  void Embed(const EmbedParams& params) override { gemm_->Embed(params); }
  void RmsNorm(const RmsNormParams& params) override { cuda::RmsNorm(params, context_); }
  void SiluMul(const SiluMulParams& params) override { cuda::SiluMul(params, context_); }
  void GatherRows(const GatherRowsParams& params) override { cuda::GatherRows(params, context_); }
  void Gemm(const GemmParams& params) override { gemm_->Gemm(params); }
  bool GatedGemm(const GatedGemmParams& params) override { return gemm_->GatedGemm(params); }
  std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params) override {
    return gemm_->GreedyLogits(params);
  }
  void RopeAppendKv(const RopeKvParams& params) override { cuda::RopeAppendKv(params, context_); }
  void PlanAttention(const AttentionPlanParams& params) override { attention_->Plan(params); }
  void Attention(const AttentionParams& params) override { attention_->Attention(params); }
  void Sample(const SampleParams& params) override { sample_->Sample(params); }
  void FinishSample() override { sample_->FinishSample(); }
  void TakeDrawnTokens(const DrawnTokensParams& params) override {
    cuda::TakeDrawnTokens(params, sample_->device_tokens(), context_);
  }
  void Score(const ScoreParams& params) override { sample_->Score(params); }

  // Policies are refused before a request can reach these (engine/sparsity.cc).
  void UpdateSidecars(const UpdateSidecarsParams&) override { GLOAM_CHECK(!"not on CUDA"); }
  void CompressPrompt(const CompressPromptParams&) override { GLOAM_CHECK(!"not on CUDA"); }
  void SparseAttention(const SparseAttentionParams&) override { GLOAM_CHECK(!"not on CUDA"); }

 private:
  const std::string name_;
  const cuda::Stream stream_;
  const cuda::Event staged_;  // the last copy from staged memory
  const DeviceContext context_;
  const std::unique_ptr<cuda::GemmBackend> gemm_;
  const std::unique_ptr<cuda::AttentionBackend> attention_;
  const std::unique_ptr<cuda::SampleBackend> sample_;
  cuda::KeptMemory kept_;
  absl::flat_hash_map<uint64_t, Recording> recordings_;  // by key; empty after the first run
};

StatusOr<std::unique_ptr<Ops>> MakeOps(const CudaOptions& options) {
  int num_devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&num_devices);
      error != cudaSuccess || num_devices == 0) {
    cudaGetLastError();
    return MakeStatus(StatusCode::kUnavailable, "no usable GPU: {}",
                      error == cudaSuccess ? "the driver lists none" : cudaGetErrorString(error));
  }
  cudaDeviceProp properties{};
  GLOAM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major < 8) {
    return Unimplemented("{} has compute capability {}.{}; 8.0 or newer is needed", properties.name,
                         properties.major, properties.minor);
  }
  return std::make_unique<CudaOps>(options, properties);
}

}  // namespace

StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const CudaOptions& options) {
  try {
    return MakeOps(options);
  } catch (const cuda::CudaError& error) {
    return MakeStatus(StatusCode::kUnavailable, "{}", error.what());
  }
}

}  // namespace gloam
