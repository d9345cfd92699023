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
  DType activation_dtype() const override { return ops_.activation_dtype(); }
  StatusOr<Buffer> Allocate(size_t bytes) override { return ops_.Allocate(bytes); }
  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight> parts) override {
    return ops_.LoadWeight(parts);
  }
  void Embed(const EmbedParams& params) override { ops_.Embed(params); }
  void RmsNorm(const RmsNormParams& params) override { ops_.RmsNorm(params); }
  void SiluMul(const SiluMulParams& params) override { ops_.SiluMul(params); }
  void GatherRows(const GatherRowsParams& params) override { ops_.GatherRows(params); }
  void Gemm(const GemmParams& params) override { ops_.Gemm(params); }
  void RopeAppendKv(const RopeKvParams& params) override { ops_.RopeAppendKv(params); }
  void Attention(const AttentionParams& params) override { ops_.Attention(params); }
  void UpdateSidecars(const UpdateSidecarsParams& params) override { ops_.UpdateSidecars(params); }
  void CompressPrompt(const CompressPromptParams& params) override { ops_.CompressPrompt(params); }
  void SparseAttention(const SparseAttentionParams& params) override {
    ops_.SparseAttention(params);
  }
  void Sample(const SampleParams& params) override { ops_.Sample(params); }
  void Score(const ScoreParams& params) override { ops_.Score(params); }

 protected:
  Ops& ops_;
};

}  // namespace gloam
