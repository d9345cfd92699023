// Ops: the seam between the model and a backend. One virtual function per operation; each has its
// contract beside its parameter struct. Calls on one Ops run in order; only the thread that drives
// the engine's steps calls them. Shapes that do not fit are a programmer's fault (GLOAM_CHECK).
#pragma once

#include <cstddef>
#include <memory>
#include <span>

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

class Ops {
 public:
  virtual ~Ops() = default;

  virtual Device device() const = 0;
  // Dtype of hidden states, Q, K, V and attention output; logits are always fp32.
  virtual DType activation_dtype() const = 0;

  // Errors: kResourceExhausted with the size asked for.
  [[nodiscard]] virtual StatusOr<Buffer> Allocate(size_t bytes) = 0;

  // Stacks `parts` (same type and cols) by rows into one weight in this backend's layout. The raw
  // data may go away afterwards. Errors: kUnimplemented naming the type, kResourceExhausted.
  [[nodiscard]] virtual StatusOr<std::unique_ptr<Weight>> LoadWeight(
      std::span<const RawWeight> parts) = 0;

  virtual void Embed(const EmbedParams& params) = 0;
  virtual void RmsNorm(const RmsNormParams& params) = 0;
  virtual void SiluMul(const SiluMulParams& params) = 0;
  virtual void GatherRows(const GatherRowsParams& params) = 0;
  virtual void Gemm(const GemmParams& params) = 0;
  virtual void RopeAppendKv(const RopeKvParams& params) = 0;
  virtual void Attention(const AttentionParams& params) = 0;
  virtual void UpdateSidecars(const UpdateSidecarsParams& params) = 0;
  virtual void CompressPrompt(const CompressPromptParams& params) = 0;
  virtual void SparseAttention(const SparseAttentionParams& params) = 0;
  virtual void Sample(const SampleParams& params) = 0;
  virtual void Score(const ScoreParams& params) = 0;
};

// How the CPU backend multiplies: int8 activations per block of 32 (fast), or fp32 activations
// (slower; for fidelity tests and references).
enum class CpuActivations : uint8_t { kInt8, kF32 };

struct CpuOptions {
  int num_threads = 0;  // 0: one per core that this process may use
  CpuActivations activations = CpuActivations::kInt8;
};

std::unique_ptr<Ops> MakeCpuOps(const CpuOptions& options);

}  // namespace gloam
