// cuBLASLt, loaded when it is first needed: large products with bf16 operands and fp32 sums.
// Owned by the GEMM backend; engine thread only.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"

namespace gloam::cuda {

// y = x w^T (+ bias) (+ y).
struct LargeProduct {
  const void* x = nullptr;  // [m, k], bf16
  int64_t x_stride = 0;
  const void* w = nullptr;  // [n, k], bf16, contiguous
  void* y = nullptr;        // [m, n]
  int64_t y_stride = 0;
  const float* bias = nullptr;  // [n] or null; only where y is fp32
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool y_is_bf16 = false;
  bool accumulate = false;
};

class CublasLt {
 public:
  static constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for Hopper

  // Looks in ../lib beside the program, then where the loader looks, then in the toolkit. Errors:
  // kUnavailable with the names that were tried.
  [[nodiscard]] static StatusOr<std::unique_ptr<CublasLt>> Load();
  ~CublasLt();

  // `workspace` is kWorkspaceBytes of device memory.
  void Multiply(const LargeProduct& product, void* workspace, cudaStream_t stream);

 private:
  struct Functions;
  struct Plan;
  // All that the choice of an algorithm depends on.
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int>;

  CublasLt() = default;
  Plan& PlanFor(const LargeProduct& product);
  std::unique_ptr<Plan> MakePlan(const LargeProduct& product);
  // `results` are ordered by expected time, the shortest first.
  cublasLtMatmulAlgo_t BestOf(std::span<const cublasLtMatmulHeuristicResult_t> results) const;

  std::unique_ptr<Functions> functions_;
  cublasLtHandle_t handle_ = nullptr;
  absl::flat_hash_map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace gloam::cuda
