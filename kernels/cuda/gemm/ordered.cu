// y = x W^T with bf16 weights, for any number of rows of x with one order of summation: an element
// is the sum of one or two parts of the columns (PartsOf), in ascending order, and a part is a
// single chain of wgmma's sums, 16 columns at a time, which does not know how many rows of x (the
// instruction's columns) there are. Few rows of x are bound by the time to read W, many by the
// tensor cores; a chain's link takes 90 cycles at least, so that W with few rows would be bound by
// that were it one chain.
//
// The data's way. A thread block computes tiles of some rows of W by 8 to 256 rows of x. One thread
// brings 64 channels at a time of both through a ring in shared memory, of x no more rows than
// there are; one or two warp groups multiply out of it. W's rows are wgmma's, of which a group has
// 64; a tile has as few of them as let every SM have its part of W: what it lacks costs nothing but
// products that nobody stores. W never changes: the ring is filled with it before earlier kernels
// are done.
//   kPlain, kGated  One part. Of a gated product, 8 rows of the gate and the same 8 of the up take
//                   turns in a tile: wgmma leaves both of an element in the same thread.
//   kSplit          Up to 256 rows of x: each part has a block of a cluster. They add their sums up
//                   out of each other's shared memory.
//   kParts          More rows of x: a block computes the parts one after the other.
// Where x has many rows, two blocks of a cluster have neighbouring tiles of W and share what they
// read of x, and bands of tiles stay in L2 while W streams by.
//
// Bytes: those of W, for up to 256 rows of x; from L2, x for every tile. FLOPs: 2 m n k.
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/gemm/cluster.cuh"
#include "kernels/cuda/gemm/ordered.h"
#include "kernels/cuda/gemm/ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace {

using cute::_64, cute::Int;
using Element = cute::bfloat16_t;
namespace GMMA = cute::SM90::GMMA;

constexpr int kGroupRows = 64;                      // of W, a warp group
constexpr int kMaxGroups = 2;                       // of warps that multiply
constexpr int kTileRows = kMaxGroups * kGroupRows;  // at most
constexpr int kTileChannels = 64;                   // 128 bytes, the width of a swizzled row
constexpr int kGroupThreads = 128;
constexpr int kRingBytes = 224 << 10;
// Tiles of x's rows that are computed at about the same time.
constexpr int kBandTiles = 8;
constexpr int kMaxParts = 2;
// W of no more rows is summed in parts. On an H100 (2026-11-26), us by 1, 64 and 2048 rows of x, as
// one chain and in two parts: down of Llama-3.1-8B (4096 x 14336) 49, 63, 310 and 41, 43, 383, o
// (4096 x 4096) 15.5, 23, 114 and 14.7, 16.4, 150. Four parts are no faster: clusters of four
// blocks wait for each other's SMs.
constexpr int kMaxPartedRows = 5120;

enum class Kind : uint8_t {
  kPlain,  // one part
  kGated,  // one part; the activation of two products
  kSplit,  // a block a part
  kParts,  // a block computes all parts
};

// kTokens: rows of x, as many as a tile has columns.
template <int kTokens, Kind kKind>
struct Config {
  static constexpr int kShare =
      kKind != Kind::kSplit && kTokens >= 128 ? 2 : 1;  // blocks with one x
  static constexpr int kStageBytes = (kTileRows + kTokens) * kTileChannels * 2;
  static constexpr int kStages = kRingBytes / kStageBytes;
  // Sums and totals need more registers than an even share: the loading threads, a warp group then,
  // give theirs.
  static constexpr bool kMovesRegisters = kKind == Kind::kParts;
  static constexpr int kLoadThreads = kMovesRegisters ? kGroupThreads : kWarpThreads;
  static constexpr int kMaxThreads = kMaxGroups * kGroupThreads + kLoadThreads;

  // A stage of what a warp group multiplies.
  template <int kRows, int kStride>
  using Layout = decltype(cute::append<3>(
      cute::tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, cute::Shape<Int<kRows>, _64>{}),
      cute::Layout<Int<kStages>, Int<kStride * kTileChannels>>{}));
  using LayoutW = Layout<kGroupRows, kTileRows>;
  using LayoutX = Layout<kTokens, kTokens>;
  using Mma = decltype(cute::make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, Int<kTokens>, _64>>()));
};

constexpr int kSumStride = kTileRows + 4;  // keeps a warp's writes off each other

template <int kTokens, Kind kKind>
struct alignas(1024) Shared {
  static constexpr int kStages = Config<kTokens, kKind>::kStages;

  struct Ring {
    Element w[kStages][kTileRows * kTileChannels];
    Element x[kStages][kTokens * kTileChannels];
  };
  union {
    Ring ring;
    float sums[kTokens][kSumStride];  // of a part, when the ring has been read
  };
  cutlass::arch::ClusterTransactionBarrier full[kStages];
  cutlass::arch::ClusterBarrier empty[kStages];

  static_assert(sizeof(sums) <= sizeof(ring));
};

struct KernelParams {
  CUtensorMap w;
  CUtensorMap x;
  const float* bias;
  void* y;
  int64_t y_stride;
  int m, n;         // of y
  int group_rows;   // of W that a warp group multiplies, at most 64
  int num_groups;   // warp groups that multiply
  int x_rows;       // of x that a block loads; those of a tile beyond are left as they are
  int num_steps;    // of 64 channels
  int num_parts;    // of them
  int row_units;    // tiles of W's rows, or a cluster's
  int token_tiles;  // of x's rows
  bool y_is_bf16;
  bool y_has_pairs;  // of columns, aligned to the size of two bf16
  bool y_has_quads;  // likewise of fp32
  bool accumulate;
};

struct Tile {
  int row;    // of W, the thread block's first
  int token;  // of x
};

// A thread block's tiles, one after the other.
template <int kTokens, Kind kKind>
class Tiles {
 public:
  static constexpr int kShare = Config<kTokens, kKind>::kShare;

  __device__ __forceinline__ explicit Tiles(const KernelParams& p)
      : p_(p),
        cluster_blocks_(kKind == Kind::kSplit ? p.num_parts : kShare),
        unit_(static_cast<int>(blockIdx.x) / cluster_blocks_) {}

  __device__ __forceinline__ bool done() const { return unit_ >= p_.row_units * p_.token_tiles; }
  __device__ __forceinline__ void Advance() {
    unit_ += static_cast<int>(gridDim.x) / cluster_blocks_;
  }

  __device__ __forceinline__ Tile Get() const {
    const int band = unit_ / (kBandTiles * p_.row_units);
    const int high = min(kBandTiles, p_.token_tiles - band * kBandTiles);
    const int in_band = unit_ - band * kBandTiles * p_.row_units;
    const int row_tile = in_band / high * kShare + static_cast<int>(blockIdx.x) % kShare;
    return {row_tile * p_.num_groups * p_.group_rows,
            (band * kBandTiles + in_band % high) * kTokens};
  }

 private:
  const KernelParams& p_;
  const int cluster_blocks_;
  int unit_;
};

// The first of the steps of a part.
__device__ __forceinline__ int FirstStep(const KernelParams& p, int part) {
  return p.num_steps * part / p.num_parts;
}

// One thread: asks for all that the thread block's tiles need.
template <int kTokens, Kind kKind>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelParams& p, Shared<kTokens, kKind>& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    const uint32_t stage_bytes =
        (p_.num_groups * p_.group_rows + kShare * p_.x_rows) * kTileChannels * sizeof(Element);
    Cursor at(p_);
    int num_early = 0;
    for (; num_early < kStages && !at.tiles.done(); ++num_early) {
      shared_.full[num_early].arrive_and_expect_tx(stage_bytes);
      LoadW(at, num_early);
      at.Advance();
    }
    WaitForEarlierKernels();
    Cursor early(p_);
    for (int i = 0; i < num_early; ++i) {
      LoadX(early, i);
      early.Advance();
    }
    RingPosition<kStages> position;
    position.phase = 1;
    for (; !at.tiles.done(); at.Advance()) {
      // Nor do the other blocks read what x will replace in all.
      shared_.empty[position.stage].wait(position.phase ^ 1);
      shared_.full[position.stage].arrive_and_expect_tx(stage_bytes);
      LoadW(at, position.stage);
      LoadX(at, position.stage);
      position.Advance();
    }
  }

 private:
  static constexpr int kStages = Config<kTokens, kKind>::kStages;
  static constexpr int kShare = Config<kTokens, kKind>::kShare;

  struct Cursor {
    Tiles<kTokens, kKind> tiles;
    Tile tile;
    int begin = 0;
    int end;
    int step;

    __device__ __forceinline__ explicit Cursor(const KernelParams& p)
        : tiles(p), tile(tiles.Get()), end(p.num_steps) {
      if constexpr (kKind == Kind::kSplit) {
        const int part = static_cast<int>(blockIdx.x) % p.num_parts;
        begin = FirstStep(p, part);
        end = FirstStep(p, part + 1);
      }
      step = begin;
    }
    __device__ __forceinline__ void Advance() {
      if (++step < end) return;
      step = begin;
      tiles.Advance();
      if (!tiles.done()) tile = tiles.Get();
    }
  };

  __device__ __forceinline__ uint64_t* Full(int stage) const {
    return reinterpret_cast<uint64_t*>(&shared_.full[stage]);
  }

  __device__ __forceinline__ void LoadW(const Cursor& at, int stage) const {
    // W is read once, but for the bands of many rows of x.
    const auto hint =
        static_cast<uint64_t>(p_.token_tiles == 1 ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                  : cute::TMA::CacheHintSm90::EVICT_NORMAL);
    const int channel = at.step * kTileChannels;
    Element* to = shared_.ring.w[stage];
    if constexpr (kKind == Kind::kGated) {
      cute::SM90_TMA_LOAD_4D::copy(&p_.w, Full(stage), hint, to, channel, 0, 0, at.tile.row / 16);
    } else {
      cute::SM90_TMA_LOAD_2D::copy(&p_.w, Full(stage), hint, to, channel, at.tile.row);
    }
  }

  __device__ __forceinline__ void LoadX(const Cursor& at, int stage) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int channel = at.step * kTileChannels;
    Element* to = shared_.ring.x[stage];
    if constexpr (kShare == 1) {
      cute::SM90_TMA_LOAD_2D::copy(&p_.x, Full(stage), kHint, to, channel, at.tile.token);
    } else {
      constexpr uint16_t kAll = (1 << kShare) - 1;
      const int first = static_cast<int>(blockIdx.x) % kShare * p_.x_rows;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p_.x, Full(stage), kAll, kHint,
                                             to + first * kTileChannels, channel,
                                             at.tile.token + first);
    }
  }

  const KernelParams& p_;
  Shared<kTokens, kKind>& shared_;
};

// y += x without waiting for what y was; this thread alone writes there.
__device__ __forceinline__ void AddTo(float* y, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(y), "f"(x) : "memory");
}
__device__ __forceinline__ void AddTo(float4* y, const float4& x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(y), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// What the threads that multiply do; `thread` counts a warp group's. Sums lie as wgmma leaves them:
// of lane = 4 g + t, rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of every 8: element
// 4 i + 2 half + j is row g + 8 half and column 8 i + 2t + j.
template <int kTokens, Kind kKind>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const KernelParams& p, Shared<kTokens, kKind>& shared,
                                        int group, int thread)
      : p_(p),
        shared_(shared),
        group_(group),
        thread_(thread),
        warp_row_(thread / kWarpThreads * 16),
        g_(thread % kWarpThreads / 4),
        t_(thread % 4) {}

  __device__ __forceinline__ void Run() {
    typename Shape::Mma mma;
    const auto slice = mma.get_slice(thread_);
    const Element* own_w = shared_.ring.w[0] + group_ * p_.group_rows * kTileChannels;
    const auto w = slice.partition_fragment_A(
        cute::make_tensor(cute::make_smem_ptr(own_w), typename Shape::LayoutW{}));
    const auto x = slice.partition_fragment_B(
        cute::make_tensor(cute::make_smem_ptr(shared_.ring.x[0]), typename Shape::LayoutX{}));
    auto sums = cute::partition_fragment_C(mma, cute::Shape<_64, Int<kTokens>>{});
    WaitForEarlierKernels();  // they may have read y
    RingPosition<Shape::kStages> at;
    const auto multiply_part = [&](int part) {
      const int num_steps = FirstStep(p_, part + 1) - FirstStep(p_, part);
      MultiplyStages(mma, w, x, shared_.full, num_steps, at, sums,
                     [&](int stage) { Release(stage); });
    };
    if constexpr (kKind == Kind::kSplit) {
      multiply_part(static_cast<int>(blockIdx.x) % p_.num_parts);
      KeepSums(sums);
    } else {
      for (Tiles<kTokens, kKind> tiles(p_); !tiles.done(); tiles.Advance()) {
        multiply_part(0);
        if constexpr (kKind == Kind::kParts) {
          auto total = cute::make_fragment_like(sums);
          cute::copy(sums, total);
          for (int part = 1; part < p_.num_parts; ++part) {
            multiply_part(part);
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i) total(i) += sums(i);
          }
          Store(tiles.Get(), total);
        } else {
          Store(tiles.Get(), sums);
        }
      }
    }
  }

  // Of kSplit, after a barrier of the cluster: adds up the parts of what is this block's share and
  // writes y.
  __device__ __forceinline__ void WriteSummed() const {
    const Tile tile = Tiles<kTokens, kKind>(p_).Get();
    const int quads = p_.num_groups * p_.group_rows / 4;  // of rows of W
    const int part = static_cast<int>(blockIdx.x) % p_.num_parts;
    const int num_threads = p_.num_groups * kGroupThreads;
    for (int i = part * num_threads + group_ * kGroupThreads + thread_; i < p_.m * quads;
         i += p_.num_parts * num_threads) {
      const int token = i / quads;
      const int row = i % quads * 4;
      WriteQuad(token, tile.row + row,
                SumOfParts<kMaxParts>(SharedAddress(&shared_.sums[token][row]), p_.num_parts));
    }
  }

 private:
  using Shape = Config<kTokens, kKind>;

  // A thread of each warp group tells each block that writes there.
  __device__ __forceinline__ void Release(int stage) const {
    if constexpr (Shape::kShare == 1) {
      if (thread_ == 0) shared_.empty[stage].arrive();
    } else if (thread_ < Shape::kShare) {
      shared_.empty[stage].arrive(thread_);
    }
  }

  template <typename Sums>
  __device__ __forceinline__ void KeepSums(const Sums& sums) const {
    // All groups have read the ring, in whose place the sums go.
    asm volatile("bar.sync 1, %0;" ::"r"(p_.num_groups * kGroupThreads) : "memory");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row_ + 8 * half;
      if (row >= p_.group_rows) break;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        float* to = &shared_.sums[8 * i + 2 * t_][group_ * p_.group_rows + row + g_];
        to[0] = sums(4 * i + 2 * half);
        to[kSumStride] = sums(4 * i + 2 * half + 1);
      }
    }
  }

  // Four rows of W, from `row` of all.
  __device__ __forceinline__ void WriteQuad(int token, int row, const float4& sum) const {
    float sums[4] = {sum.x, sum.y, sum.z, sum.w};
    if (p_.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < p_.n) sums[i] += p_.bias[row + i];
      }
    }
    float* y = static_cast<float*>(p_.y) + token * p_.y_stride + row;
    if (p_.y_has_quads) {
      if (row < p_.n) Put(reinterpret_cast<float4*>(y), {sums[0], sums[1], sums[2], sums[3]});
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < p_.n) Put(y + i, sums[i]);
    }
  }

  template <typename T>
  __device__ __forceinline__ void Put(T* y, const T& value) const {
    if (p_.accumulate) {
      AddTo(y, value);
    } else {
      *y = value;
    }
  }

  template <typename Sums>
  __device__ __forceinline__ void Store(const Tile& tile, Sums& sums) const {
    const int first = tile.row + group_ * p_.group_rows + warp_row_;
    if constexpr (kKind == Kind::kGated) {
      if (warp_row_ >= p_.group_rows) return;
      StorePairs(first / 2, tile.token,
                 [&](int i, int j) { return SiluTimes(sums(4 * i + j), sums(4 * i + 2 + j)); });
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (warp_row_ + 8 * half < p_.group_rows) {
          StoreRows(first + 8 * half, tile.token, half, sums);
        }
      }
    }
  }

  // Rows `first_row` to `first_row` + 8 of W.
  template <typename Sums>
  __device__ __forceinline__ void StoreRows(int first_row, int first_token, int half,
                                            Sums& sums) const {
    const int row = first_row + g_;
    if (p_.bias != nullptr) {
      const float bias = row < p_.n ? p_.bias[row] : 0.0f;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        sums(4 * i + 2 * half) += bias;
        sums(4 * i + 2 * half + 1) += bias;
      }
    }
    const auto value = [&](int i, int j) { return sums(4 * i + 2 * half + j); };
    if (!p_.y_is_bf16) {
      StoreElements<float>(row, first_token, value, [&](float* y, float x) { Put(y, x); });
    } else if (p_.accumulate || !p_.y_has_pairs) {
      StoreElements<__nv_bfloat16>(row, first_token, value, [&](__nv_bfloat16* y, float x) {
        *y = __float2bfloat16(p_.accumulate ? __bfloat162float(*y) + x : x);
      });
    } else {
      StorePairs(first_row, first_token, value);
    }
  }

  // value(i, j): of row g, column 8 i + 2t + j.
  template <typename T, typename Value, typename PutElement>
  __device__ __forceinline__ void StoreElements(int row, int first_token, const Value& value,
                                                const PutElement& put) const {
    if (row >= p_.n) return;
    const int own_token = first_token + 2 * t_;
    T* y = static_cast<T*>(p_.y) + own_token * p_.y_stride + row;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int offset = 8 * i + j;
        if (own_token + offset < p_.m) put(y + offset * p_.y_stride, value(i, j));
      }
    }
  }

  // bf16: neighbouring elements of a row of y together.
  template <typename Value>
  __device__ __forceinline__ void StorePairs(int first_row, int first_token,
                                             const Value& value) const {
    const int row = first_row + 2 * t_;
    const int own_token = first_token + g_;
    auto* y = static_cast<__nv_bfloat16*>(p_.y) + own_token * p_.y_stride + row;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      const uint32_t pair = Transpose8x8(PackBf16(value(i, 0), value(i, 1)));
      if (row < p_.n && own_token + 8 * i < p_.m) {
        *reinterpret_cast<uint32_t*>(y + 8 * i * p_.y_stride) = pair;
      }
    }
  }

  const KernelParams& p_;
  Shared<kTokens, kKind>& shared_;
  const int group_;
  const int thread_;
  const int warp_row_;  // of the group's
  const int g_, t_;
};

template <int kTokens, Kind kKind>
__global__ void __launch_bounds__(Config<kTokens, kKind>::kMaxThreads, 1)
    OrderedGemmKernel(const __grid_constant__ KernelParams p) {
  using Shape = Config<kTokens, kKind>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kTokens, kKind>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(p.num_groups * Shape::kShare);
    }
    cutlass::arch::fence_barrier_init();
  }
  AllowNextKernel();
  cute::cluster_sync();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  Multiplier<kTokens, kKind> multiplier(p, shared, group,
                                        static_cast<int>(threadIdx.x) % kGroupThreads);
  if (group < p.num_groups) {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<232>();
    multiplier.Run();
  } else {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x % kGroupThreads == 0) Loader<kTokens, kKind>(p, shared).Run();
    __syncwarp();
  }
  if constexpr (kKind == Kind::kSplit) {
    cute::cluster_sync();
    if (group < p.num_groups) multiplier.WriteSummed();
  }
  // A block's barriers and memory are there as long as another may use them.
  cute::cluster_sync();
}

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Parts of the columns that are summed by themselves, where y is fp32.
int PartsOf(const PlainProduct& product) {
  if (product.y_is_bf16 || product.n > kMaxPartedRows) return 1;
  return std::min(kMaxParts, CeilDiv(product.k, kTileChannels));
}

// How W's rows are cut into tiles: `num_groups` times `group_rows` each, a multiple of the unit.
struct RowShape {
  int group_rows;
  int num_groups;
  int row_units;  // of `share` tiles
};

// The least work of the busiest block: in rows of W and x that it reads, or multiplies in the time
// that reading as many takes; a round costs as much as a few.
RowShape FindRowShape(int64_t num_rows, int unit_rows, int tokens, int token_tiles, int share,
                      int num_clusters) {
  constexpr int kRoundRows = 8;
  RowShape best = {};
  int least = 0;
  for (int groups = 1; groups <= kMaxGroups; ++groups) {
    for (int rows = unit_rows; rows <= kGroupRows; rows += unit_rows) {
      if (groups > 1 && rows <= kGroupRows / 2) continue;
      const int units = CeilDiv(num_rows, groups * rows * share);
      const int work = std::max(groups * rows + tokens, groups * tokens * 4 / 5) + kRoundRows;
      const int cost = CeilDiv(int64_t{units} * token_tiles, num_clusters) * work;
      if (least == 0 || cost <= least) {
        least = cost;
        best = {rows, groups, units};
      }
    }
  }
  return best;
}

// What a block loads of a tile of x. A box beyond x's last row is slow: 64 rows in two boxes for 17
// take the ring twice as long (H100, 2026-11-26).
int XRows(int64_t m, int tokens, int share) {
  constexpr int kSwizzledRows = 8;  // where a block's rows begin in shared memory
  if (m >= tokens) return tokens / share;
  return share == 1 ? static_cast<int>(m) : CeilDiv(m, kSwizzledRows * share) * kSwizzledRows;
}

bool HasPairs(const PlainProduct& product) {
  return product.n % 2 == 0 && product.y_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(product.y) % 4 == 0;
}

template <int kTokens, Kind kKind>
void Launch(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  using Shape = Config<kTokens, kKind>;
  constexpr auto kKernel = OrderedGemmKernel<kTokens, kKind>;
  constexpr int kMaxSharedBytes = 227 << 10;
  constexpr bool kIsGated = kKind == Kind::kGated;
  AllowSharedBytes<kKernel>(kMaxSharedBytes);
  // A block an SM.
  static const ClusterCounts max_clusters =
      MaxClusters(kKernel, Shape::kMaxThreads, kMaxSharedBytes);
  KernelParams p = {};
  p.num_parts = kIsGated ? 1 : PartsOf(product);
  p.token_tiles = CeilDiv(product.m, kTokens);
  const int cluster_blocks = kKind == Kind::kSplit ? p.num_parts : Shape::kShare;
  const int num_clusters = cluster_blocks == 1 ? num_sms : max_clusters[cluster_blocks];
  const RowShape rows = FindRowShape(kIsGated ? 2 * product.n : product.n, kIsGated ? 16 : 8,
                                     kTokens, p.token_tiles, Shape::kShare, num_clusters);
  p.group_rows = rows.group_rows;
  p.num_groups = rows.num_groups;
  p.row_units = rows.row_units;
  p.x_rows = XRows(product.m, kTokens, Shape::kShare);
  const int64_t n = product.n, k = product.k;
  const int tile_rows = p.num_groups * p.group_rows;
  if constexpr (kIsGated) {
    p.w = MakeTensorMap<4>(product.w, {k, 8, 2, n / 8}, {k, n * k, 8 * k},
                           {kTileChannels, 8, 2, tile_rows / 16});
  } else {
    p.w = MakeTensorMap<2>(product.w, {k, n}, {k}, {kTileChannels, tile_rows});
  }
  p.x = MakeTensorMap<2>(product.x, {k, product.m}, {product.x_stride}, {kTileChannels, p.x_rows});
  p.bias = product.bias;
  p.y = product.y;
  p.y_stride = product.y_stride;
  p.m = static_cast<int>(product.m);
  p.n = static_cast<int>(n);
  p.num_steps = CeilDiv(k, kTileChannels);
  p.y_is_bf16 = product.y_is_bf16;
  p.y_has_pairs = HasPairs(product);
  p.y_has_quads = n % 4 == 0 && product.y_stride % 4 == 0 && IsAligned16(product.y);
  p.accumulate = product.accumulate;
  // A cluster whose blocks have a part each has one tile: the sums take the ring's place.
  const int num_units = p.row_units * p.token_tiles;
  const int grid_clusters = kKind == Kind::kSplit ? num_units : std::min(num_units, num_clusters);
  LaunchKernel(kKernel,
               {dim3(grid_clusters * cluster_blocks),
                dim3(p.num_groups * kGroupThreads + Shape::kLoadThreads),
                sizeof(Shared<kTokens, kKind>), cluster_blocks},
               stream, p);
}

template <Kind kKind>
void LaunchForRows(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  const auto launch = product.m <= 8     ? Launch<8, kKind>
                      : product.m <= 16  ? Launch<16, kKind>
                      : product.m <= 32  ? Launch<32, kKind>
                      : product.m <= 64  ? Launch<64, kKind>
                      : product.m <= 128 ? Launch<128, kKind>
                                         : Launch<256, kKind>;
  launch(product, num_sms, stream);
}

bool IsSound(const PlainProduct& product) {
  return product.m > 0 && product.n > 0 && product.k > 0 && product.k % 8 == 0 &&
         product.x_stride % 8 == 0;
}

}  // namespace

void MultiplyOrdered(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(IsSound(product));
  if (PartsOf(product) == 1) return LaunchForRows<Kind::kPlain>(product, num_sms, stream);
  if (product.m <= 256) return LaunchForRows<Kind::kSplit>(product, num_sms, stream);
  Launch<192, Kind::kParts>(product, num_sms, stream);  // sums and totals fill the registers
}

void MultiplyOrderedGated(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(IsSound(product) && product.n % 8 == 0 && product.y_is_bf16 && !product.accumulate &&
              product.bias == nullptr && HasPairs(product));
  LaunchForRows<Kind::kGated>(product, num_sms, stream);
}

}  // namespace gloam::cuda
