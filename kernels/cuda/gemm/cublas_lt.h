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
#include "kernels/cuda/gemm/plain_product.h"

namespace gloam::cuda {

class CublasLt {
 public:
  static constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA advises for Hopper

  // Looks in ../lib beside the program, then where the loader looks, then in the toolkit. Errors:
  // kUnavailable with the names that were tried.
  [[nodiscard]] static StatusOr<std::unique_ptr<CublasLt>> Load();
  ~CublasLt();

  // `workspace` is kWorkspaceBytes of device memory; a bias only where y is fp32.
  void Multiply(const PlainProduct& product, void* workspace, cudaStream_t stream);

 private:
  struct Functions;
  struct Plan;
  // All that the choice of an algorithm depends on.
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int>;

  CublasLt() = default;
  Plan& PlanFor(const PlainProduct& product);
  std::unique_ptr<Plan> MakePlan(const PlainProduct& product);
  // `results` are ordered by expected time, the shortest first.
  cublasLtMatmulAlgo_t BestOf(std::span<const cublasLtMatmulHeuristicResult_t> results,
                              const PlainProduct& product) const;

  std::unique_ptr<Functions> functions_;
  cublasLtHandle_t handle_ = nullptr;
  absl::flat_hash_map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace gloam::cuda
