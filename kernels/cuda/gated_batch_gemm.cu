// y = silu(x W_gate^T) * (x W_up^T) for the rows of a decode batch, which the time to read W
// bounds: W's rows are the 64 rows of wgmma and x's rows its columns, of which there are 32 to 256,
// so that nothing is padded to more.
//
// A thread block computes tiles of 64 columns of y by all rows of x. One thread brings 64 channels
// at a time of both through a ring in shared memory; two warp groups multiply, 64 rows of W each. 8
// rows of the gate and the same 8 of the up take turns in a tile: wgmma leaves both of an element
// in the same thread. From 65 rows of x on, two blocks of a cluster have neighbouring tiles and
// share what they read of x.
//
// W never changes: the ring is filled with it before earlier kernels are done.
#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include <algorithm>

#include "kernels/cuda/gated_gemm.h"
#include "kernels/cuda/gemm_ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace {

using cute::_1, cute::_128, cute::_2, cute::_64, cute::Int;
using Element = cute::bfloat16_t;

constexpr int kTileRows = 128;               // of W
constexpr int kTileChannels = 64;            // 128 bytes, the width of a swizzled row
constexpr int kTileColumns = kTileRows / 2;  // of y
constexpr int kGroupThreads = 128;
constexpr int kNumGroups = 2;
constexpr int kMultiplyThreads = kNumGroups * kGroupThreads;
constexpr int kThreads = kMultiplyThreads + kWarpThreads;  // the last warp loads

template <int kTokens>
struct Multiply64;
template <>
struct Multiply64<32> {
  using Atom =
      cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>;
};
template <>
struct Multiply64<64> {
  using Atom =
      cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>;
};
template <>
struct Multiply64<128> {
  using Atom =
      cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>;
};
template <>
struct Multiply64<256> {
  using Atom =
      cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>;
};

// kTokens: rows of x, as many as a tile has columns.
template <int kTokens>
struct Config {
  static constexpr int kShare = kTokens >= 128 ? 2 : 1;  // blocks that share x
  static constexpr int kStages = kTokens == 32 ? 5 : kTokens == 128 ? 6 : 4;

  using Ring = Int<kStages>;
  using SwizzledRows = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutW = decltype(cute::tile_to_shape(SwizzledRows{}, cute::Shape<_128, _64, Ring>{}));
  using LayoutX =
      decltype(cute::tile_to_shape(SwizzledRows{}, cute::Shape<Int<kTokens>, _64, Ring>{}));
  using Mma = decltype(cute::make_tiled_mma(typename Multiply64<kTokens>::Atom{},
                                            cute::Layout<cute::Shape<_2, _1, _1>>{}));
};

template <int kTokens>
struct alignas(1024) Shared {
  static constexpr int kStages = Config<kTokens>::kStages;

  Element w[kStages][kTileRows * kTileChannels];
  Element x[kStages][kTokens * kTileChannels];
  cutlass::arch::ClusterTransactionBarrier full[kStages];
  cutlass::arch::ClusterBarrier empty[kStages];

  static constexpr uint32_t kStageBytes = sizeof(w[0]) + sizeof(x[0]);
};

struct KernelParams {
  CUtensorMap w;
  CUtensorMap x;
  __nv_bfloat16* y;
  int64_t y_stride;
  int m, n;       // of y
  int num_steps;  // of 64 channels
  int num_units;  // tiles, or pairs of them
};

// A thread block's tiles: `first`, `first` + `stride`, ...
struct Work {
  int share;  // which of a pair of tiles
  int first, stride, num_tiles;
};

template <int kShare>
__device__ __forceinline__ Work FindWork(const KernelParams& p) {
  const int cluster = static_cast<int>(blockIdx.x) / kShare;
  const int num_clusters = static_cast<int>(gridDim.x) / kShare;
  Work work;
  work.share = static_cast<int>(blockIdx.x) % kShare;
  work.first = cluster * kShare + work.share;
  work.stride = num_clusters * kShare;
  work.num_tiles = (p.num_units - cluster + num_clusters - 1) / num_clusters;
  return work;
}

// One thread: asks for all that the thread block's tiles need.
template <int kTokens>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelParams& p, const Work& work,
                                    Shared<kTokens>& shared)
      : p_(p), work_(work), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    const int num_steps = work_.num_tiles * p_.num_steps;
    const int num_early = min(num_steps, kStages);
    Cursor at = {work_.first, 0};
    for (int i = 0; i < num_early; ++i) {
      shared_.full[i].arrive_and_expect_tx(Shared<kTokens>::kStageBytes);
      LoadW(at, i);
      Advance(at);
    }
    WaitForEarlierKernels();
    Cursor early = {work_.first, 0};
    for (int i = 0; i < num_early; ++i) {
      LoadX(early, i);
      Advance(early);
    }
    RingPosition<kStages> position;
    position.phase = 1;
    for (int i = num_early; i < num_steps; ++i) {
      // Nor does the other block read what x will replace in both.
      shared_.empty[position.stage].wait(position.phase ^ 1);
      shared_.full[position.stage].arrive_and_expect_tx(Shared<kTokens>::kStageBytes);
      LoadW(at, position.stage);
      LoadX(at, position.stage);
      Advance(at);
      position.Advance();
    }
  }

 private:
  static constexpr int kStages = Config<kTokens>::kStages;
  static constexpr int kShare = Config<kTokens>::kShare;

  struct Cursor {
    int tile;
    int step;
  };

  __device__ __forceinline__ void Advance(Cursor& at) const {
    if (++at.step == p_.num_steps) {
      at.step = 0;
      at.tile += work_.stride;
    }
  }

  __device__ __forceinline__ uint64_t* Full(int stage) const {
    return reinterpret_cast<uint64_t*>(&shared_.full[stage]);
  }

  __device__ __forceinline__ void LoadW(const Cursor& at, int stage) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    cute::SM90_TMA_LOAD_4D::copy(&p_.w, Full(stage), kHint, shared_.w[stage],
                                 at.step * kTileChannels, 0, 0, at.tile * (kTileColumns / 8));
  }

  __device__ __forceinline__ void LoadX(const Cursor& at, int stage) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int channel = at.step * kTileChannels;
    Element* to = shared_.x[stage];
    if constexpr (kShare == 1) {
      cute::SM90_TMA_LOAD_2D::copy(&p_.x, Full(stage), kHint, to, channel, 0);
    } else {
      constexpr int kPart = kTokens / kShare;
      constexpr uint16_t kBoth = (1 << kShare) - 1;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p_.x, Full(stage), kBoth, kHint,
                                             to + work_.share * kPart * kTileChannels, channel,
                                             work_.share * kPart);
    }
  }

  const KernelParams& p_;
  const Work& work_;
  Shared<kTokens>& shared_;
};

// An 8 x 8 matrix of 16-bit elements, two of row lane / 4 in each lane, transposed.
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// What the threads that multiply do; `thread` counts them. Sums lie as wgmma leaves them: of lane =
// 4 g + t, rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of every 8.
template <int kTokens>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const KernelParams& p, const Work& work,
                                        Shared<kTokens>& shared, int thread)
      : p_(p), work_(work), shared_(shared), thread_(thread) {}

  __device__ __forceinline__ void Run() {
    typename Shape::Mma mma;
    const auto slice = mma.get_slice(thread_);
    const auto w = slice.partition_fragment_A(
        cute::make_tensor(cute::make_smem_ptr(shared_.w[0]), typename Shape::LayoutW{}));
    const auto x = slice.partition_fragment_B(
        cute::make_tensor(cute::make_smem_ptr(shared_.x[0]), typename Shape::LayoutX{}));
    auto sums = cute::partition_fragment_C(mma, cute::Shape<_128, Int<kTokens>>{});
    WaitForEarlierKernels();  // they may have read y
    RingPosition<Shape::kStages> at;
    for (int i = 0; i < work_.num_tiles; ++i) {
      MultiplyStages(mma, w, x, shared_.full, p_.num_steps, at, sums,
                     [&](int stage) { Release(stage); });
      Store(work_.first + i * work_.stride, sums);
    }
  }

 private:
  using Shape = Config<kTokens>;

  // A thread of each warp group tells each block that writes there.
  __device__ __forceinline__ void Release(int stage) const {
    if constexpr (Shape::kShare == 1) {
      if (thread_ % kGroupThreads == 0) shared_.empty[stage].arrive();
    } else if (thread_ % kGroupThreads < Shape::kShare) {
      shared_.empty[stage].arrive(thread_ % kGroupThreads);
    }
  }

  // Rows of a tile are columns of y.
  template <typename Sums>
  __device__ __forceinline__ void Store(int tile, const Sums& sums) const {
    const int lane = thread_ % kWarpThreads;
    const int first = tile * kTileColumns + thread_ / kWarpThreads * 8;
    if (first >= p_.n) return;
    __nv_bfloat16* to = p_.y + lane / 4 * p_.y_stride + first + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      const uint32_t column = PackBf16(SiluTimes(sums(4 * i), sums(4 * i + 2)),
                                       SiluTimes(sums(4 * i + 1), sums(4 * i + 3)));
      const uint32_t row = Transpose8x8(column);
      if (8 * i + lane / 4 < p_.m) {
        *reinterpret_cast<uint32_t*>(to + 8 * i * p_.y_stride) = row;
      }
    }
  }

  const KernelParams& p_;
  const Work& work_;
  Shared<kTokens>& shared_;
  const int thread_;
};

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    GatedBatchGemmKernel(const __grid_constant__ KernelParams p) {
  using Shape = Config<kTokens>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(memory);
  const Work work = FindWork<Shape::kShare>(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(kNumGroups * Shape::kShare);
    }
    cutlass::arch::fence_barrier_init();
  }
  AllowNextKernel();
  cute::cluster_sync();
  if (threadIdx.x < kMultiplyThreads) {
    Multiplier<kTokens>(p, work, shared, static_cast<int>(threadIdx.x)).Run();
  } else {
    if (threadIdx.x == kMultiplyThreads) Loader<kTokens>(p, work, shared).Run();
    __syncwarp();
  }
  // A block's barriers and memory are there as long as the other may write to them.
  cute::cluster_sync();
}

int TilesOf(const GatedProduct& product) {
  return static_cast<int>((product.n + kTileColumns - 1) / kTileColumns);
}

template <int kTokens>
void Launch(const GatedProduct& product) {
  constexpr int kShare = Config<kTokens>::kShare;
  const int64_t k = product.k;
  KernelParams p = {};
  p.w = MakeTensorMap<4>(product.w, {k, 8, 2, product.n / 8}, {k, product.n * k, 8 * k},
                         {kTileChannels, 8, 2, kTileColumns / 8});
  p.x = MakeTensorMap<2>(product.x, {k, product.m}, {product.x_stride},
                         {kTileChannels, kTokens / kShare});
  p.y = static_cast<__nv_bfloat16*>(product.y);
  p.y_stride = product.y_stride;
  p.m = static_cast<int>(product.m);
  p.n = static_cast<int>(product.n);
  p.num_steps = static_cast<int>((k + kTileChannels - 1) / kTileChannels);
  p.num_units = (TilesOf(product) + kShare - 1) / kShare;
  const int num_clusters = std::min(p.num_units, product.num_sms / kShare);
  constexpr auto kKernel = GatedBatchGemmKernel<kTokens>;
  constexpr int kSharedBytes = sizeof(Shared<kTokens>);
  AllowSharedBytes<kKernel>(kSharedBytes);
  LaunchKernel(kKernel, {dim3(num_clusters * kShare), dim3(kThreads), size_t{kSharedBytes}, kShare},
               product.stream, p);
}

}  // namespace

bool TakesGatedBatch(const GatedProduct& product) {
  return product.m > 0 && product.m <= kMaxGatedBatch && product.n % 8 == 0 && product.k % 8 == 0 &&
         TilesOf(product) >= product.num_sms;
}

void MultiplyGatedBatch(const GatedProduct& product) {
  GLOAM_CHECK(TakesGatedBatch(product));
  const auto launch = product.m <= 32    ? Launch<32>
                      : product.m <= 64  ? Launch<64>
                      : product.m <= 128 ? Launch<128>
                                         : Launch<256>;
  launch(product);
}

}  // namespace gloam::cuda
