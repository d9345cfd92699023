// The CUDA backend's operations; cuda_ops.cc gathers them into an Ops. Contracts are in the headers
// of kernels/. Everything is enqueued on context.stream; nothing here allocates or synchronises
// outside construction, Reserve and LoadWeight, but FinishSample and Score, which read results.
//
// Dtypes: residual fp32; inputs of products bf16; Q, K, V before RoPE bf16 or fp32; rotated queries
// have the cache's type, or fp16 over an fp8 cache.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/ops.h"

namespace gloam::cuda {

// read_rate.cu. Synchronises.
double MeasureReadRate(const DeviceContext& context);

// step_input.cu. Copies pinned memory, which must not change before the copy has ended.
void CopyFromPinned(const void* host, void* device, size_t bytes, const DeviceContext& context);
// `drawn`: SampleBackend::device_tokens.
void TakeDrawnTokens(const DrawnTokensParams& params, const int32_t* drawn,
                     const DeviceContext& context);

// elementwise.cu
void RmsNorm(const RmsNormParams& params, const DeviceContext& context);
void SiluMul(const SiluMulParams& params, const DeviceContext& context);
void GatherRows(const GatherRowsParams& params, const DeviceContext& context);

// Of rotated queries over a cache of `kv`. An fp8 cache is read as fp16, which holds every e4m3.
constexpr DType QueryDType(DType kv) { return kv == DType::kF8E4M3 ? DType::kF16 : kv; }

// rope_kv.cu
void RopeAppendKv(const RopeKvParams& params, const DeviceContext& context);

// Matrix products with their weights and scratch memory: gemm/.
class GemmBackend {
 public:
  virtual ~GemmBackend() = default;
  [[nodiscard]] virtual Status Reserve(const StepLimits& limits) = 0;
  [[nodiscard]] virtual StatusOr<std::unique_ptr<Weight>> LoadWeight(
      std::span<const RawWeight> parts) = 0;
  virtual void Embed(const EmbedParams& params) = 0;
  virtual void Gemm(const GemmParams& params) = 0;
  virtual bool GatedGemm(const GatedGemmParams& params) = 0;
  virtual std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params) = 0;
};
std::unique_ptr<GemmBackend> MakeGemmBackend(const DeviceContext& context);

// Dense attention with its plan and scratch memory: attention.cc, decode/, prefill/.
class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  [[nodiscard]] virtual Status Reserve(const StepLimits& limits) = 0;
  virtual void Plan(const AttentionPlanParams& params) = 0;
  virtual void Attention(const AttentionParams& params) = 0;
};
std::unique_ptr<AttentionBackend> MakeAttentionBackend(const DeviceContext& context);

// Sampling with its scratch memory: sample/. Score returns when its results are there. Sample and
// Score allocate only for a call whose lists (banned, bias, prompt, counts) or likely tokens
// outgrow what was there (CudaError when there is no memory). output_counts must name each token
// once.
class SampleBackend {
 public:
  virtual ~SampleBackend() = default;
  [[nodiscard]] virtual Status Reserve(const StepLimits& limits) = 0;
  virtual void Sample(const SampleParams& params) = 0;
  virtual void FinishSample() = 0;  // see Ops
  virtual void Score(const ScoreParams& params) = 0;
  // [num_rows] of the last Sample, on the device; stays where it is while no call has more rows
  // than were reserved.
  virtual const int32_t* device_tokens() const = 0;
};
std::unique_ptr<SampleBackend> MakeSampleBackend(const DeviceContext& context);

}  // namespace gloam::cuda
