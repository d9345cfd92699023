// Thread blocks of a cluster (compute capability 9.0) that share the columns of a matrix product.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "kernels/cuda/check.h"

namespace gloam::cuda {

inline constexpr int kMaxClusterBlocks = 8;

// Waits for every block of the cluster; their shared memory is then as they left it.
__device__ __forceinline__ void SyncCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Four floats at `address` of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 LoadFromBlock(uint32_t address, int rank) {
  float4 out = {};
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
               : "r"(there)
               : "memory");
#endif
  return out;
}

// The sum of parts 0, 1, ... of four floats each, at most kMaxParts of them: every block of the
// cluster has `per_block`, the first at `address` of its shared memory, the others `part_bytes`
// after one another. All are asked for before the first is needed.
template <int kMaxParts>
__device__ __forceinline__ float4 SumOfParts(uint32_t address, int num_parts, int per_block = 1,
                                             int part_bytes = 0) {
  float4 parts[kMaxParts];
#pragma unroll
  for (int i = 0; i < kMaxParts; ++i) {
    if (i < num_parts) {
      parts[i] = LoadFromBlock(address + i % per_block * part_bytes, i / per_block);
    }
  }
  float4 sum = parts[0];
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i) {
    if (i < num_parts) {
      sum = {sum.x + parts[i].x, sum.y + parts[i].y, sum.z + parts[i].z, sum.w + parts[i].w};
    }
  }
  return sum;
}

using ClusterCounts = std::array<int, kMaxClusterBlocks + 1>;  // by blocks of a cluster

// Clusters of each size that `num_sms` of the device's SMs run at a time.
template <typename Kernel>
ClusterCounts MaxClusters(Kernel kernel, int num_threads, int shared_bytes, int num_sms) {
  ClusterCounts counts = {};
  for (int blocks = 1; blocks <= kMaxClusterBlocks; ++blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(num_threads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    GLOAM_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&counts[blocks], kernel, &config));
    counts[blocks] = std::min(counts[blocks], num_sms / blocks);
  }
  return counts;
}

// Blocks that share the columns of a tile: as many as make the least of rounds times stages; to
// fill a ring and to add the sums takes a block as long as a few stages.
inline int ClusterBlocks(int num_tiles, int num_slices, const ClusterCounts& max_clusters,
                         int max_blocks = kMaxClusterBlocks) {
  constexpr int kOverhead = 4;
  int best = 1;
  int least = 0;
  for (int blocks = 1; blocks <= max_blocks; ++blocks) {
    if (max_clusters[blocks] == 0) continue;
    const int rounds = (num_tiles + max_clusters[blocks] - 1) / max_clusters[blocks];
    const int cost = rounds * ((num_slices + blocks - 1) / blocks + kOverhead);
    if (blocks == 1 || cost < least) {
      best = blocks;
      least = cost;
    }
  }
  return best;
}

}  // namespace gloam::cuda
