// ForwardingOps: an Ops that passes every call on to another. Decorators (timing, recording) derive
// from it and override what they look at.
#pragma once

#include "kernels/ops.h"

namespace gloam {

class ForwardingOps : public Ops {
 public:
  // `ops` must outlive this object.
  explicit ForwardingOps(Ops& ops) : ops_(ops) {}

  Device device() const override { return ops_.device(); }
  std::string DeviceName() const override { return ops_.DeviceName(); }
  ActivationDTypes activation_dtypes() const override { return ops_.activation_dtypes(); }
  DType QueryDType(DType kv) const override { return ops_.QueryDType(kv); }
  DeviceMemory memory() const override { return ops_.memory(); }
  double MeasureReadRate() override { return ops_.MeasureReadRate(); }
  StatusOr<Buffer> Allocate(size_t bytes) override { return ops_.Allocate(bytes); }
  StatusOr<StagedBuffer> AllocateStaged(size_t bytes) override {
    return ops_.AllocateStaged(bytes);
  }
  Status Reserve(const StepLimits& limits) override { return ops_.Reserve(limits); }
  void Upload(void* device, const void* host, size_t bytes) override {
    ops_.Upload(device, host, bytes);
  }
  void Download(void* host, const void* device, size_t bytes) override {
    ops_.Download(host, device, bytes);
  }
  void BeginStep() override { ops_.BeginStep(); }
  void Stage(const StagedBuffer& buffer, size_t offset, size_t bytes) override {
    ops_.Stage(buffer, offset, bytes);
  }
  // Not passed on: a repeated step would go past the decorator.
  void Repeat(uint64_t /*key*/, const std::function<void()>& step) override { step(); }
  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight> parts) override {
    return ops_.LoadWeight(parts);
  }
  void Embed(const EmbedParams& params) override { ops_.Embed(params); }
  void RmsNorm(const RmsNormParams& params) override { ops_.RmsNorm(params); }
  void SiluMul(const SiluMulParams& params) override { ops_.SiluMul(params); }
  void GatherRows(const GatherRowsParams& params) override { ops_.GatherRows(params); }
  void Gemm(const GemmParams& params) override { ops_.Gemm(params); }
  bool GatedGemm(const GatedGemmParams& params) override { return ops_.GatedGemm(params); }
  std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params) override {
    return ops_.GreedyLogits(params);
  }
  void RopeAppendKv(const RopeKvParams& params) override { ops_.RopeAppendKv(params); }
  void PlanAttention(const AttentionPlanParams& params) override { ops_.PlanAttention(params); }
  void Attention(const AttentionParams& params) override { ops_.Attention(params); }
  void UpdateSidecars(const UpdateSidecarsParams& params) override { ops_.UpdateSidecars(params); }
  void CompressPrompt(const CompressPromptParams& params) override { ops_.CompressPrompt(params); }
  void SparseAttention(const SparseAttentionParams& params) override {
    ops_.SparseAttention(params);
  }
  void Sample(const SampleParams& params) override { ops_.Sample(params); }
  void FinishSample() override { ops_.FinishSample(); }
  void TakeDrawnTokens(const DrawnTokensParams& params) override { ops_.TakeDrawnTokens(params); }
  void Score(const ScoreParams& params) override { ops_.Score(params); }

 protected:
  Ops& ops_;
};

}  // namespace gloam
