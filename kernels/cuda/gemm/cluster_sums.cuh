// The end of a product whose sums were computed in parts by the blocks of a cluster, in the shared
// memory of each.
#pragma once

#include "kernels/cuda/gemm/cluster.cuh"
#include "kernels/cuda/gemm/common.cuh"

namespace gloam::cuda {

// Adds up the parts of a tile of kRows rows of W by up to kTokens of x and stores the sums; a block
// does its share. `sums`: this block's parts, [per_block][kTokens][kStride], which it has written
// before; part i of all num_parts is one of block i / per_block.
template <typename Format, int kMaxParts, int kRows, int kTokens, int kStride>
__device__ __forceinline__ void StoreClusterSums(const StreamGemmParams& params, int first_unit,
                                                 int first_token, const float* sums, int num_parts,
                                                 int per_block) {
  SyncCluster();
  constexpr int kPartBytes = kTokens * kStride * static_cast<int>(sizeof(float));
  constexpr int kQuads = kRows / 4;  // of rows of W
  const int num_quads = min(kTokens, params.m - first_token) * kQuads;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_quads; i += gridDim.x * blockDim.x) {
    const int token = i / kQuads;
    const int row = i % kQuads * 4;
    const int unit = first_unit + row / kUnitRows;
    if (unit >= params.num_units) continue;
    const float4 sum = SumOfParts<kMaxParts>(SharedAddress(sums + token * kStride + row), num_parts,
                                             per_block, kPartBytes);
    const auto store = [&](int offset, float value) {
      StoreOutput<Format>(params, unit, row % kUnitRows + offset, first_token + token, value);
    };
    store(0, sum.x);
    store(1, sum.y);
    store(2, sum.z);
    store(3, sum.w);
  }
  SyncCluster();  // nobody reads here any more
}

}  // namespace gloam::cuda
