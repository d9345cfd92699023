// TimedOps: an Ops that passes every call on and keeps the time per operation, for benches. Matrix
// products are told apart by the shape of their weights.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>

#include "kernels/forwarding_ops.h"

namespace gloam {

class TimedOps final : public ForwardingOps {
 public:
  struct Entry {
    int64_t calls = 0;
    double seconds = 0;
    double flops = 0;         // of matrix products, else 0
    double weight_bytes = 0;  // read by matrix products, else 0
  };

  explicit TimedOps(Ops& ops) : ForwardingOps(ops) {}

  const std::map<std::string, Entry>& entries() const { return entries_; }
  void Clear() { entries_.clear(); }

  // A table of the entries, slowest first: calls, milliseconds per call, share, GFLOP/s, GB/s.
  std::string Report() const;

  void Embed(const EmbedParams& params) override;
  void RmsNorm(const RmsNormParams& params) override;
  void SiluMul(const SiluMulParams& params) override;
  void GatherRows(const GatherRowsParams& params) override;
  void Gemm(const GemmParams& params) override;
  bool GatedGemm(const GatedGemmParams& params) override;
  std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params) override;
  void RopeAppendKv(const RopeKvParams& params) override;
  void Attention(const AttentionParams& params) override;
  void UpdateSidecars(const UpdateSidecarsParams& params) override;
  void CompressPrompt(const CompressPromptParams& params) override;
  void SparseAttention(const SparseAttentionParams& params) override;
  void Sample(const SampleParams& params) override;
  void Score(const ScoreParams& params) override;

 private:
  // Adds a call that began then to the entry `name`, which it returns.
  Entry& AddCall(const std::string& name, std::chrono::steady_clock::time_point begin);
  // Adds a product with one weight that began then.
  void AddProduct(const char* name, const TensorView& x, const Weight& weight,
                  std::chrono::steady_clock::time_point begin);
  // Runs `call` and adds its time to the entry `name`, which it returns.
  template <typename Call>
  Entry& Time(const std::string& name, const Call& call);

  std::map<std::string, Entry> entries_;
};

}  // namespace gloam
