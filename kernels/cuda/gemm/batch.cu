// y = x W^T, and silu(x W_gate^T) * (x W_up^T), for the rows of a decode batch, which the time to
// read W bounds.
//
// A thread block computes tiles of some rows of W by all rows of x. One thread brings 64 channels
// at a time of both through a ring in shared memory; warp groups multiply. Two blocks of a cluster
// may have neighbouring tiles and share what they read of x. W never changes: the ring is filled
// with it before earlier kernels are done.
//
// Plain products: the up to 64 rows of x are wgmma's rows, and a tile has so many rows of W that
// there is one for almost every SM: no sums are split, nothing is left for a second round. Where
// tiles are not too small, two blocks fit an SM, so that attention may start while Q, K and V are
// made.
//
// Gated products: rows of W are wgmma's rows, rows of x its columns, of which there are 32 to 256,
// so that nothing is padded to more. In a tile 8 rows of the gate and the same 8 of the up take
// turns: wgmma leaves both of an element in the same thread.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // 48 columns
#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include <algorithm>

#include "kernels/cuda/gemm/batch.h"
#include "kernels/cuda/gemm/gated.h"
#include "kernels/cuda/gemm/ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace {

using cute::_1, cute::_2, cute::_64, cute::Int;
using Element = cute::bfloat16_t;

constexpr int kTileChannels = 64;  // 128 bytes, the width of a swizzled row
constexpr int kGroupThreads = 128;
constexpr int kMaxPlainTokens = 64;

template <int kColumns>
struct Multiply64;
#define GLOAM_MULTIPLY_64(columns)                                                             \
  template <>                                                                                  \
  struct Multiply64<columns> {                                                                 \
    using Atom = cute::SM90::GMMA::MMA_64x##columns##x16_F32BF16BF16_SS<cute::GMMA::Major::K,  \
                                                                        cute::GMMA::Major::K>; \
  };
GLOAM_MULTIPLY_64(32)
GLOAM_MULTIPLY_64(48)
GLOAM_MULTIPLY_64(64)
GLOAM_MULTIPLY_64(128)
GLOAM_MULTIPLY_64(256)
#undef GLOAM_MULTIPLY_64

template <int kRows, int kStages>
using RingLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                                cute::Shape<Int<kRows>, _64, Int<kStages>>{}));

template <int kTileRowsOfW, int kStagesOfRing>
struct PlainShape {
  static constexpr bool kGated = false;
  static constexpr int kTokens = kMaxPlainTokens;  // of x in a tile
  static constexpr int kTileRows = kTileRowsOfW;
  static constexpr int kColumns = kTileRows;  // of y
  static constexpr int kShare = 2;            // blocks that share x
  static constexpr int kNumGroups = 1;
  static constexpr int kStages = kStagesOfRing;

  using Mma = decltype(cute::make_tiled_mma(typename Multiply64<kTileRows>::Atom{}));
};
using NarrowShape = PlainShape<32, 14>;  // brings twice as much of x as of W
using UsualShape = PlainShape<48, 7>;
using WideShape = PlainShape<128, 7>;

template <int kTokensOfX>
struct GatedShape {
  static constexpr bool kGated = true;
  static constexpr int kTokens = kTokensOfX;
  static constexpr int kTileRows = 128;
  static constexpr int kColumns = kTileRows / 2;
  static constexpr int kShare = kTokens >= 128 ? 2 : 1;
  static constexpr int kNumGroups = 2;
  static constexpr int kStages = kTokens == 32 ? 5 : kTokens == 128 ? 6 : 4;

  using Mma = decltype(cute::make_tiled_mma(typename Multiply64<kTokens>::Atom{},
                                            cute::Layout<cute::Shape<_2, _1, _1>>{}));
};

template <typename Shape>
constexpr int kMultiplyThreads = Shape::kNumGroups* kGroupThreads;
template <typename Shape>
constexpr int kThreads = kMultiplyThreads<Shape> + kWarpThreads;  // the last warp loads

template <typename Shape>
struct alignas(1024) Shared {
  Element w[Shape::kStages][Shape::kTileRows * kTileChannels];
  Element x[Shape::kStages][Shape::kTokens * kTileChannels];
  cutlass::arch::ClusterTransactionBarrier full[Shape::kStages];
  cutlass::arch::ClusterBarrier empty[Shape::kStages];
};

struct KernelParams {
  CUtensorMap w;
  CUtensorMap x;
  const float* bias;
  void* y;
  int64_t y_stride;
  int m, n;       // of y
  int num_steps;  // of 64 channels
  int num_units;  // tiles, or pairs of them
  int x_rows;     // that a block loads; those of a tile beyond are left as they are
  bool y_is_bf16;
  bool accumulate;
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
template <typename Shape>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelParams& p, const Work& work, Shared<Shape>& shared)
      : p_(p), work_(work), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    const int num_steps = work_.num_tiles * p_.num_steps;
    const int num_early = min(num_steps, kStages);
    Cursor at = {work_.first, 0};
    for (int i = 0; i < num_early; ++i) {
      shared_.full[i].arrive_and_expect_tx(StageBytes());
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
      shared_.full[position.stage].arrive_and_expect_tx(StageBytes());
      LoadW(at, position.stage);
      LoadX(at, position.stage);
      Advance(at);
      position.Advance();
    }
  }

 private:
  static constexpr int kStages = Shape::kStages;
  static constexpr int kShare = Shape::kShare;

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

  __device__ __forceinline__ uint32_t StageBytes() const {
    return (Shape::kTileRows + kShare * p_.x_rows) * kTileChannels * sizeof(Element);
  }

  __device__ __forceinline__ uint64_t* Full(int stage) const {
    return reinterpret_cast<uint64_t*>(&shared_.full[stage]);
  }

  __device__ __forceinline__ void LoadW(const Cursor& at, int stage) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    const int channel = at.step * kTileChannels;
    if constexpr (Shape::kGated) {
      cute::SM90_TMA_LOAD_4D::copy(&p_.w, Full(stage), kHint, shared_.w[stage], channel, 0, 0,
                                   at.tile * (Shape::kColumns / 8));
    } else {
      cute::SM90_TMA_LOAD_2D::copy(&p_.w, Full(stage), kHint, shared_.w[stage], channel,
                                   at.tile * Shape::kTileRows);
    }
  }

  __device__ __forceinline__ void LoadX(const Cursor& at, int stage) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int channel = at.step * kTileChannels;
    Element* to = shared_.x[stage];
    if constexpr (kShare == 1) {
      cute::SM90_TMA_LOAD_2D::copy(&p_.x, Full(stage), kHint, to, channel, 0);
    } else {
      constexpr uint16_t kAll = (1 << kShare) - 1;
      const int first = work_.share * p_.x_rows;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p_.x, Full(stage), kAll, kHint,
                                             to + first * kTileChannels, channel, first);
    }
  }

  const KernelParams& p_;
  const Work& work_;
  Shared<Shape>& shared_;
};

// y += x without waiting for what y was; this thread alone writes there.
__device__ __forceinline__ void AddTo(float* y, float2 x) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(y), "f"(x.x), "f"(x.y)
               : "memory");
}

// What the threads that multiply do; `thread` counts them. Sums lie as wgmma leaves them: of lane =
// 4 g + t, rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of every 8.
template <typename Shape>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const KernelParams& p, const Work& work,
                                        Shared<Shape>& shared, int thread)
      : p_(p),
        work_(work),
        shared_(shared),
        thread_(thread),
        warp_(thread / kWarpThreads),
        g_(thread % kWarpThreads / 4),
        t_(thread % kWarpThreads % 4) {}

  __device__ __forceinline__ void Run() {
    const auto w = cute::make_tensor(cute::make_smem_ptr(shared_.w[0]),
                                     RingLayout<Shape::kTileRows, Shape::kStages>{});
    const auto x = cute::make_tensor(cute::make_smem_ptr(shared_.x[0]),
                                     RingLayout<Shape::kTokens, Shape::kStages>{});
    if constexpr (Shape::kGated) {
      Run(w, x);
    } else {
      Run(x, w);
    }
  }

 private:
  // a's rows are wgmma's rows, b's its columns.
  template <typename A, typename B>
  __device__ __forceinline__ void Run(const A& a, const B& b) const {
    typename Shape::Mma mma;
    const auto slice = mma.get_slice(thread_);
    const auto a_fragments = slice.partition_fragment_A(a);
    const auto b_fragments = slice.partition_fragment_B(b);
    auto sums =
        cute::partition_fragment_C(mma, cute::make_shape(cute::size<0>(a), cute::size<0>(b)));
    WaitForEarlierKernels();  // they may use y
    RingPosition<Shape::kStages> at;
    for (int i = 0; i < work_.num_tiles; ++i) {
      MultiplyStages(mma, a_fragments, b_fragments, shared_.full, p_.num_steps, at, sums,
                     [&](int stage) { Release(stage); });
      const int tile = work_.first + i * work_.stride;
      if constexpr (Shape::kGated) {
        StoreGated(tile, sums);
      } else {
        StorePlain(tile, sums);
      }
    }
  }

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
  __device__ __forceinline__ void StoreGated(int tile, const Sums& sums) const {
    const int first = tile * Shape::kColumns + warp_ * 8;
    if (first >= p_.n) return;
    __nv_bfloat16* to = static_cast<__nv_bfloat16*>(p_.y) + g_ * p_.y_stride + first + 2 * t_;
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 8; ++i) {
      const uint32_t column = PackBf16(SiluTimes(sums(4 * i), sums(4 * i + 2)),
                                       SiluTimes(sums(4 * i + 1), sums(4 * i + 3)));
      const uint32_t row = Transpose8x8(column);
      if (8 * i + g_ < p_.m) *reinterpret_cast<uint32_t*>(to + 8 * i * p_.y_stride) = row;
    }
  }

  template <typename Sums>
  __device__ __forceinline__ void StorePlain(int tile, const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 8; ++i) {
      const int column = tile * Shape::kColumns + 8 * i + 2 * t_;
      if (column >= p_.n) return;
      float2 bias = {0, 0};
      if (p_.bias != nullptr) bias = *reinterpret_cast<const float2*>(p_.bias + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = warp_ * 16 + 8 * half + g_;
        if (token >= p_.m) continue;
        const int64_t at = token * p_.y_stride + column;
        const float2 sum = {sums(4 * i + 2 * half) + bias.x, sums(4 * i + 2 * half + 1) + bias.y};
        if (p_.y_is_bf16) {
          *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p_.y) + at) =
              PackBf16(sum.x, sum.y);
        } else if (p_.accumulate) {
          AddTo(static_cast<float*>(p_.y) + at, sum);
        } else {
          *reinterpret_cast<float2*>(static_cast<float*>(p_.y) + at) = sum;
        }
      }
    }
  }

  const KernelParams& p_;
  const Work& work_;
  Shared<Shape>& shared_;
  const int thread_;
  const int warp_;
  const int g_, t_;
};

template <typename Shape>
__global__ void __launch_bounds__(kThreads<Shape>, 1)
    BatchGemmKernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<Shape>*>(memory);
  const Work work = FindWork<Shape::kShare>(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(Shape::kNumGroups * Shape::kShare);
    }
    cutlass::arch::fence_barrier_init();
  }
  AllowNextKernel();
  cute::cluster_sync();
  if (threadIdx.x < kMultiplyThreads<Shape>) {
    Multiplier<Shape>(p, work, shared, static_cast<int>(threadIdx.x)).Run();
  } else {
    if (threadIdx.x == kMultiplyThreads<Shape>) Loader<Shape>(p, work, shared).Run();
    __syncwarp();
  }
  // A block's barriers and memory are there as long as the other may write to them.
  cute::cluster_sync();
}

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// What a block loads of a tile of x. A box beyond the last row is slow: 64 rows in two boxes for 17
// take the ring twice as long.
template <typename Shape>
int XRows(int64_t m) {
  if (Shape::kGated) return Shape::kTokens / Shape::kShare;
  constexpr int kSwizzledRows = 8;
  const int pieces = CeilDiv(m, kSwizzledRows * Shape::kShare);
  return pieces * kSwizzledRows;
}

template <typename Shape>
void Launch(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  constexpr int kShare = Shape::kShare;
  const int64_t k = product.k;
  KernelParams p = {};
  if constexpr (Shape::kGated) {
    p.w = MakeTensorMap<4>(product.w, {k, 8, 2, product.n / 8}, {k, product.n * k, 8 * k},
                           {kTileChannels, 8, 2, Shape::kColumns / 8});
  } else {
    p.w = MakeTensorMap<2>(product.w, {k, product.n}, {k}, {kTileChannels, Shape::kTileRows});
  }
  p.x_rows = XRows<Shape>(product.m);
  p.x = MakeTensorMap<2>(product.x, {k, product.m}, {product.x_stride}, {kTileChannels, p.x_rows});
  p.bias = product.bias;
  p.y = product.y;
  p.y_stride = product.y_stride;
  p.m = static_cast<int>(product.m);
  p.n = static_cast<int>(product.n);
  p.num_steps = CeilDiv(k, kTileChannels);
  p.num_units = CeilDiv(product.n, kShare * Shape::kColumns);
  p.y_is_bf16 = product.y_is_bf16;
  p.accumulate = product.accumulate;
  const int num_clusters = std::min(p.num_units, num_sms / kShare);
  constexpr auto kKernel = BatchGemmKernel<Shape>;
  constexpr int kSharedBytes = sizeof(Shared<Shape>);
  AllowSharedBytes<kKernel>(kSharedBytes);
  LaunchKernel(kKernel,
               {dim3(num_clusters * kShare), dim3(kThreads<Shape>), size_t{kSharedBytes}, kShare},
               stream, p);
}

template <typename Shape>
int TilesOf(int64_t n) {
  return CeilDiv(n, Shape::kColumns);
}

// Whether there is a tile for almost every SM, and no more.
template <typename Shape>
bool Fits(int64_t n, int num_sms) {
  const int num_tiles = TilesOf<Shape>(n);
  return num_tiles <= num_sms && 10 * num_tiles >= 9 * num_sms;
}

bool IsWide(int64_t n, int num_sms) { return TilesOf<WideShape>(n) >= 4 * num_sms; }

}  // namespace

bool TakesBatch(const PlainProduct& product, int num_sms) {
  const int64_t n = product.n;
  return product.m > 0 && product.m <= kMaxPlainTokens && n % 8 == 0 && product.k % 8 == 0 &&
         product.x_stride % 8 == 0 && product.y_stride % 2 == 0 && IsAligned16(product.x) &&
         IsAligned16(product.w) && IsAligned16(product.y) && IsAligned16(product.bias) &&
         !(product.accumulate && product.y_is_bf16) &&
         (IsWide(n, num_sms) || Fits<UsualShape>(n, num_sms) || Fits<NarrowShape>(n, num_sms));
}

void MultiplyBatch(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(TakesBatch(product, num_sms));
  const auto launch = IsWide(product.n, num_sms)             ? Launch<WideShape>
                      : Fits<UsualShape>(product.n, num_sms) ? Launch<UsualShape>
                                                             : Launch<NarrowShape>;
  launch(product, num_sms, stream);
}

bool TakesGatedBatch(const PlainProduct& product, int num_sms) {
  return product.m > 0 && product.m <= kMaxGatedBatch && product.n % 8 == 0 && product.k % 8 == 0 &&
         TilesOf<GatedShape<kMaxGatedBatch>>(product.n) >= num_sms;
}

void MultiplyGatedBatch(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(TakesGatedBatch(product, num_sms));
  const auto launch = product.m <= 32    ? Launch<GatedShape<32>>
                      : product.m <= 64  ? Launch<GatedShape<64>>
                      : product.m <= 128 ? Launch<GatedShape<128>>
                                         : Launch<GatedShape<256>>;
  launch(product, num_sms, stream);
}

}  // namespace gloam::cuda
