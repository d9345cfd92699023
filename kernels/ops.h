// Ops: the seam between the model and a backend. One virtual function per operation; each has its
// contract beside its parameter struct. Calls on one Ops run in order; only the thread that drives
// the engine's steps calls them. Shapes that do not fit are a programmer's fault (GLOAM_CHECK).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/paged_kv.h"
#include "kernels/rope_kv.h"
#include "kernels/sample.h"
#include "kernels/sidecars.h"
#include "kernels/sparse_attention.h"
#include "kernels/tensor_view.h"
#include "kernels/weight.h"

namespace gloam {

// Owns zero-initialised device memory, aligned to at least 64 bytes. Move-only.
class Buffer {
 public:
  using Deleter = void (*)(void* data, size_t bytes);

  Buffer() = default;
  Buffer(void* data, size_t bytes, Deleter deleter)
      : data_(data), bytes_(bytes), deleter_(deleter) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(deleter_, other.deleter_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) deleter_(data_, bytes_);
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Deleter deleter_ = nullptr;
};

// An array that the host fills and operations read. Where the device shares the host's memory both
// pointers are one. Move-only.
struct StagedBuffer {
  Buffer host;    // to write to
  Buffer device;  // to read from; empty where it is `host`

  void* host_data() const { return host.data(); }
  void* device_data() const { return device.data() != nullptr ? device.data() : host.data(); }
};

// What a forward pass hands from one operation to the next; logits are always fp32.
struct ActivationDTypes {
  DType residual = DType::kF32;  // hidden states
  DType input = DType::kF32;     // what matrix products read: normed, attended, gate and up
  DType qkv = DType::kF32;       // Q, K and V to be rotated as a product gives them
};

// The largest step that a backend's own scratch memory has to serve.
struct StepLimits {
  int max_tokens = 0;
  int max_seqs = 0;
  int max_context = 0;     // tokens of one sequence
  int max_logit_rows = 0;  // of Sample and Score
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  DType kv_dtype = DType::kBF16;
};

struct DeviceMemory {
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  virtual Device device() const = 0;
  virtual std::string DeviceName() const = 0;  // for people: "NVIDIA H100 80GB HBM3"
  virtual ActivationDTypes activation_dtypes() const = 0;
  // Dtype of rotated queries over a cache of `kv`.
  virtual DType QueryDType(DType kv) const = 0;
  virtual DeviceMemory memory() const = 0;
  // Bytes per second at which operations can read memory: the ceiling that benches compare with.
  // Measured by the call on 1 GiB that it allocates; about 0.1 s. 0 where there is no room.
  virtual double MeasureReadRate() = 0;

  // Errors: kResourceExhausted with the size asked for.
  [[nodiscard]] virtual StatusOr<Buffer> Allocate(size_t bytes) = 0;
  [[nodiscard]] virtual StatusOr<StagedBuffer> AllocateStaged(size_t bytes) = 0;
  // Makes room for steps up to `limits`; afterwards no operation allocates. Errors:
  // kResourceExhausted with the size.
  [[nodiscard]] virtual Status Reserve(const StepLimits& limits) = 0;

  // Names the memory that repeated steps (Repeat) read and write again and again, in place of what
  // was named before: a backend may keep it in its cache while weights and keys stream by.
  virtual void KeepInCache(void* /*data*/, size_t /*bytes*/) {}

  // Copies between host memory and the backend's; when they return, the copy is complete.
  virtual void Upload(void* device, const void* host, size_t bytes) = 0;
  virtual void Download(void* host, const void* device, size_t bytes) = 0;

  // Before the host writes to staged memory: waits until the device has taken what it held.
  virtual void BeginStep() = 0;
  // Brings [offset, offset + bytes) of what the host wrote to the device, in order with operations.
  virtual void Stage(const StagedBuffer& buffer, size_t offset, size_t bytes) = 0;

  // Runs `step`. Its operations must depend on `key` and on device memory alone: a backend may
  // record them under the key and repeat them without calling `step` again.
  virtual void Repeat(uint64_t key, const std::function<void()>& step) = 0;

  // Stacks `parts` (same type and cols) by rows into one weight in this backend's layout. The raw
  // data may go away afterwards. Errors: kUnimplemented naming the type, kResourceExhausted.
  [[nodiscard]] virtual StatusOr<std::unique_ptr<Weight>> LoadWeight(
      std::span<const RawWeight> parts) = 0;

  virtual void Embed(const EmbedParams& params) = 0;
  virtual void RmsNorm(const RmsNormParams& params) = 0;
  virtual void SiluMul(const SiluMulParams& params) = 0;
  virtual void GatherRows(const GatherRowsParams& params) = 0;
  virtual void Gemm(const GemmParams& params) = 0;
  // Returns false, with nothing done, where Gemm and SiluMul are as fast.
  [[nodiscard]] virtual bool GatedGemm(const GatedGemmParams& /*params*/) { return false; }
  // Returns nothing, with nothing done, where Gemm and Sample are as fast.
  [[nodiscard]] virtual std::optional<LogitRows> GreedyLogits(
      const GreedyLogitsParams& /*params*/) {
    return std::nullopt;
  }
  virtual void RopeAppendKv(const RopeKvParams& params) = 0;
  // Once per forward pass, before its first Attention.
  virtual void PlanAttention(const AttentionPlanParams& params) = 0;
  virtual void Attention(const AttentionParams& params) = 0;
  virtual void UpdateSidecars(const UpdateSidecarsParams& params) = 0;
  virtual void CompressPrompt(const CompressPromptParams& params) = 0;
  virtual void SparseAttention(const SparseAttentionParams& params) = 0;
  // On a device with memory of its own the call returns before the tokens are drawn.
  virtual void Sample(const SampleParams& params) = 0;
  virtual void Score(const ScoreParams& params) = 0;
  // Waits for the last Sample, not for what was called after it, and completes its results. Comes
  // before the next Sample or Score, unless nobody wants the results any more.
  virtual void FinishSample() = 0;
  virtual void TakeDrawnTokens(const DrawnTokensParams& params) = 0;
};

// How the CPU backend multiplies: int8 activations per block of 32 (fast), or fp32 activations
// (slower; for fidelity tests and references).
enum class CpuActivations : uint8_t { kInt8, kF32 };

struct CpuOptions {
  int num_threads = 0;  // 0: one per core that this process may use
  CpuActivations activations = CpuActivations::kInt8;
};

std::unique_ptr<Ops> MakeCpuOps(const CpuOptions& options);

// The backend runs on the first GPU that CUDA_VISIBLE_DEVICES leaves.
struct CudaOptions {
  // One order of every sum whatever else is in the batch: an answer's bits do not depend on its
  // neighbours, on chunking, on cache hits or on pre-emption. Costs speed.
  bool batch_invariant = false;
  // Keeps bf16, fp16 and fp32 weight matrices as fp8 (e4m3) with a scale per row.
  bool fp8_weights = false;
};

// Errors: kUnavailable (no usable device or driver, or built without CUDA), kUnimplemented (a
// device older than compute capability 8.0).
[[nodiscard]] StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const CudaOptions& options);

}  // namespace gloam
