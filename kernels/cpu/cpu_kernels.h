// The CPU backend's operations as free functions; cpu_ops.cc gathers them into an Ops. Contracts
// are in the headers of kernels/.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "base/status.h"
#include "kernels/cpu/sparse/selection_memory.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops.h"
#include "kernels/sidecars.h"

namespace gloam::cpu {

// Memory that an operation needs while it runs, kept from call to call: Get() grows it when needed
// and returns at least `bytes` bytes, 64-byte aligned, contents undefined.
class Scratch {
 public:
  void* Get(size_t bytes);

 private:
  Buffer buffer_;
};

// read_rate.cc
double MeasureReadRate(ThreadPool& pool);

// gemm/
StatusOr<std::unique_ptr<Weight>> PackWeight(std::span<const RawWeight> parts, ThreadPool& pool);
void Embed(const EmbedParams& params, ThreadPool& pool);
void Gemm(const GemmParams& params, CpuActivations activations, ThreadPool& pool, Scratch& scratch);
// Nothing without rows, or where y has no room for a candidate per row and thread.
std::optional<LogitRows> GreedyLogits(const GreedyLogitsParams& params, CpuActivations activations,
                                      ThreadPool& pool, Scratch& scratch);

// elementwise.cc
void RmsNorm(const RmsNormParams& params, ThreadPool& pool);
void SiluMul(const SiluMulParams& params, ThreadPool& pool);
void GatherRows(const GatherRowsParams& params);

// rope_kv.cc
void RopeAppendKv(const RopeKvParams& params, ThreadPool& pool);

// sidecars/
void UpdateSidecars(const UpdateSidecarsParams& params, ThreadPool& pool);

// attention/
void Attention(const AttentionParams& params, ThreadPool& pool, Scratch& scratch);

// sparse/compress_prompt.cc
void CompressPrompt(const CompressPromptParams& params, ThreadPool& pool);

// sparse/sparse_attention.cc
void SparseAttention(const SparseAttentionParams& params, ThreadPool& pool, Scratch& scratch,
                     SelectionMemory& memory);

// sample/
void Sample(const SampleParams& params, ThreadPool& pool);
void Score(const ScoreParams& params, ThreadPool& pool);

}  // namespace gloam::cpu
