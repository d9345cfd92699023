// The CPU backend's Ops: one object that owns the threads and the scratch memory and forwards to
// the free functions of cpu_kernels.h.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/memory.h"

namespace gloam {
namespace {

// Whole cores that the control group's quota allows; INT_MAX without a quota (cgroup v2).
int CgroupCores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period_us = 0;
  if (!(file >> quota >> period_us) || quota == "max" || period_us <= 0) return INT_MAX;
  return std::max(1, static_cast<int>(std::strtod(quota.c_str(), nullptr) / period_us + 0.5));
}

int UsableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::min(CPU_COUNT(&set), CgroupCores());
}

class CpuOps final : public Ops {
 public:
  explicit CpuOps(const CpuOptions& options)
      : activations_(options.activations),
        pool_(options.num_threads > 0 ? options.num_threads : UsableCores()) {}

  Device device() const override { return Device::kCpu; }
  std::string DeviceName() const override { return "cpu"; }
  ActivationDTypes activation_dtypes() const override { return {}; }
  DType QueryDType(DType /*kv*/) const override { return DType::kF32; }
  DeviceMemory memory() const override {
    const int64_t page_bytes = sysconf(_SC_PAGESIZE);
    return {.free_bytes = sysconf(_SC_AVPHYS_PAGES) * page_bytes,
            .total_bytes = sysconf(_SC_PHYS_PAGES) * page_bytes};
  }
  double MeasureReadRate() override { return cpu::MeasureReadRate(pool_); }

  StatusOr<Buffer> Allocate(size_t bytes) override { return cpu::AllocateBuffer(bytes); }
  StatusOr<StagedBuffer> AllocateStaged(size_t bytes) override {
    StagedBuffer staged;
    GLOAM_ASSIGN_OR_RETURN(staged.host, cpu::AllocateBuffer(bytes));
    return staged;
  }
  Status Reserve(const StepLimits& /*limits*/) override { return OkStatus(); }
  void Upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void Download(void* host, const void* device, size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  void BeginStep() override {}
  void Stage(const StagedBuffer& /*buffer*/, size_t /*offset*/, size_t /*bytes*/) override {}
  void Repeat(uint64_t /*key*/, const std::function<void()>& step) override { step(); }
  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight> parts) override {
    return cpu::PackWeight(parts, pool_);
  }

  void Embed(const EmbedParams& params) override { cpu::Embed(params, pool_); }
  void RmsNorm(const RmsNormParams& params) override { cpu::RmsNorm(params, pool_); }
  void SiluMul(const SiluMulParams& params) override { cpu::SiluMul(params, pool_); }
  void GatherRows(const GatherRowsParams& params) override { cpu::GatherRows(params); }
  void Gemm(const GemmParams& params) override {
    cpu::Gemm(params, activations_, pool_, gemm_scratch_);
  }
  std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params) override {
    return cpu::GreedyLogits(params, activations_, pool_, gemm_scratch_);
  }
  void RopeAppendKv(const RopeKvParams& params) override { cpu::RopeAppendKv(params, pool_); }
  void PlanAttention(const AttentionPlanParams& /*params*/) override {}
  void Attention(const AttentionParams& params) override {
    cpu::Attention(params, pool_, attention_scratch_);
  }
  void UpdateSidecars(const UpdateSidecarsParams& params) override {
    cpu::UpdateSidecars(params, pool_);
  }
  void CompressPrompt(const CompressPromptParams& params) override {
    cpu::CompressPrompt(params, pool_);
  }
  void SparseAttention(const SparseAttentionParams& params) override {
    cpu::SparseAttention(params, pool_, attention_scratch_, selection_memory_);
  }
  void Sample(const SampleParams& params) override { cpu::Sample(params, pool_); }
  void FinishSample() override {}
  void TakeDrawnTokens(const DrawnTokensParams&) override {}  // the host knows them before a step
  void Score(const ScoreParams& params) override { cpu::Score(params, pool_); }

 private:
  const CpuActivations activations_;
  cpu::ThreadPool pool_;
  cpu::Scratch gemm_scratch_;
  cpu::Scratch attention_scratch_;
  cpu::SelectionMemory selection_memory_;
};

}  // namespace

std::unique_ptr<Ops> MakeCpuOps(const CpuOptions& options) {
  return std::make_unique<CpuOps>(options);
}

}  // namespace gloam
