// What the thread blocks of ordered products work on and how it gets there: kinds of tiles and
// their shapes, what lies in shared memory, which tiles are a block's, the thread that loads. Part
// of ordered.cu.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cute/tensor.hpp>

#include <cstdint>

#include "kernels/cuda/gemm/ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda::ordered {

using cute::_64, cute::Int;
using Element = cute::bfloat16_t;
namespace GMMA = cute::SM90::GMMA;

constexpr int kGroupRows = 64;  // of W, a warp group, where its rows are wgmma's
constexpr int kMaxGroups = 2;   // of warps that multiply, likewise
constexpr int kMaxTileRows = kMaxGroups * kGroupRows;
constexpr int kTileChannels = 64;  // 128 bytes, the width of a swizzled row
constexpr int kGroupThreads = 128;
constexpr int kRingBytes = 224 << 10;
// Tiles of x's rows that are computed at about the same time.
constexpr int kBandTiles = 8;
constexpr int kMaxParts = 2;

enum class Kind : uint8_t {
  kPlain,    // one part
  kGated,    // one part; the activation of two products
  kSplit,    // a block a part
  kParts,    // a block computes all parts
  kLargest,  // one part; of each row of x the largest element alone
};

// kTileTokens: rows of x of a tile; kMostRows: of W.
template <int kTileTokens, Kind kTileKind, int kMostRows = kMaxTileRows>
struct Config {
  static constexpr int kTokens = kTileTokens;
  static constexpr Kind kKind = kTileKind;
  static constexpr int kTileRows = kMostRows;
  static constexpr bool kIsGated = kKind == Kind::kGated;
  // wgmma's rows are x's.
  static constexpr bool kXFirst =
      kTokens > 128 && !(kKind == Kind::kSplit || kKind == Kind::kParts);
  static constexpr int kShare =
      kKind != Kind::kSplit && kTokens >= 128 ? 2 : 1;  // blocks with one x

  // x comes from L2, W from memory: the room that is left over is W's.
  static constexpr int kRingRows = kRingBytes / (kTileChannels * 2);  // of both
  static constexpr int kXStages = kRingRows / (kTileRows + kTokens);
  static constexpr int kWStages = (kRingRows - kXStages * kTokens) / kTileRows;
  static constexpr bool kInStep = kXStages == kWStages;  // a barrier serves both

  // What a warp group multiplies: its rows by all of the other's.
  static constexpr int kOwnRows = !kXFirst ? kGroupRows : kTokens % 128 == 0 ? 128 : 64;
  static constexpr int kColumns = kXFirst ? kTileRows : kTokens;
  static constexpr int kMostGroups = kXFirst ? kTokens / kOwnRows : kMaxGroups;
  // Sums and totals need more registers than an even share: the loading threads, a warp group then,
  // give theirs.
  static constexpr bool kMovesRegisters = kKind == Kind::kParts;
  static constexpr int kLoadThreads = kMovesRegisters ? kGroupThreads : kWarpThreads;
  static constexpr int kMaxThreads = kMostGroups * kGroupThreads + kLoadThreads;

  template <int kRows, int kStride, int kStages>
  using Layout = decltype(cute::append<3>(
      cute::tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, cute::Shape<Int<kRows>, _64>{}),
      cute::Layout<Int<kStages>, Int<kStride * kTileChannels>>{}));
  using LayoutA = Layout<kOwnRows, kXFirst ? kTokens : kTileRows, kXFirst ? kXStages : kWStages>;
  using LayoutB = Layout<kColumns, kColumns, kXFirst ? kWStages : kXStages>;
  using Mma = decltype(cute::make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, Int<kColumns>, _64>>()));
  static_assert(cute::size<1>(typename Mma::AtomShape_MNK{}) == kColumns, "one instruction");
};

template <typename Shape>
struct alignas(1024) Shared {
  static constexpr int kTileRows = Shape::kTileRows;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSumStride = kTileRows + 4;  // keeps a warp's writes off each other

  struct Ring {
    Element w[Shape::kWStages][kTileRows * kTileChannels];
    Element x[Shape::kXStages][kTokens * kTileChannels];
  };
  union {
    Ring ring;
    float sums[kTokens][kSumStride];  // of a part, when the ring has been read
  };
  cutlass::arch::ClusterTransactionBarrier full_w[Shape::kWStages];  // in step: of x too
  cutlass::arch::ClusterTransactionBarrier full_x[Shape::kXStages];
  cutlass::arch::ClusterBarrier empty[Shape::kXStages];  // of x, and of the W with it

  static_assert(sizeof(sums) <= sizeof(ring));
};

struct KernelParams {
  CUtensorMap w;
  CUtensorMap x;
  const float* bias;
  void* y;
  int32_t* largest;  // of kLargest: the rows of W that y's elements belong to
  int64_t y_stride;
  int m, n;         // of y
  int num_groups;   // warp groups that multiply
  int tile_rows;    // of W
  int group_rows;   // of them that a warp group multiplies, at most 64, where they are wgmma's
  int x_rows;       // of x that a block loads; those of a tile beyond are left as they are
  int num_steps;    // of 64 channels
  int num_parts;    // of them
  int row_units;    // tiles of W's rows, or a cluster's
  int token_tiles;  // of x's rows
  bool y_is_bf16;
  bool y_has_pairs;  // of columns, aligned to the size of two
  bool y_has_quads;  // likewise of fp32
  bool accumulate;
};

struct Tile {
  int row;    // of W, the thread block's first
  int token;  // of x
};

// A thread block's tiles, one after the other.
template <typename Shape>
class Tiles {
 public:
  static constexpr int kShare = Shape::kShare;

  __device__ __forceinline__ explicit Tiles(const KernelParams& p)
      : p_(p),
        cluster_blocks_(Shape::kKind == Kind::kSplit ? p.num_parts : kShare),
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
    return {row_tile * p_.tile_rows, (band * kBandTiles + in_band % high) * Shape::kTokens};
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
template <typename Shape>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelParams& p, Shared<Shape>& shared)
      : p_(p), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    Cursor<Shape::kWStages> w(p_);
    Cursor<Shape::kXStages> x(p_);
    for (int i = 0; i < Shape::kWStages && !w.tiles.done(); ++i) LoadW(w);
    WaitForEarlierKernels();
    for (int step = 0; !x.tiles.done(); ++step) {
      if (step >= Shape::kXStages) {
        // The step whose stages come next has been read; in the other blocks too, as x goes to all.
        shared_.empty[x.at.stage].wait(x.at.phase ^ 1);
        if (!w.tiles.done()) LoadW(w);
      }
      LoadX(x);
    }
  }

 private:
  static constexpr int kShare = Shape::kShare;

  static __device__ __forceinline__ uint32_t RowBytes(int rows) {
    return rows * kTileChannels * sizeof(Element);
  }

  // Goes through the steps of all tiles, and round a ring.
  template <int kStages>
  struct Cursor {
    Tiles<Shape> tiles;
    Tile tile;
    RingPosition<kStages> at;
    int begin = 0;
    int end;
    int step;

    __device__ __forceinline__ explicit Cursor(const KernelParams& p)
        : tiles(p), tile(tiles.Get()), end(p.num_steps) {
      if constexpr (Shape::kKind == Kind::kSplit) {
        const int part = static_cast<int>(blockIdx.x) % p.num_parts;
        begin = FirstStep(p, part);
        end = FirstStep(p, part + 1);
      }
      step = begin;
    }
    __device__ __forceinline__ void Advance() {
      at.Advance();
      if (++step < end) return;
      step = begin;
      tiles.Advance();
      if (!tiles.done()) tile = tiles.Get();
    }
  };

  __device__ __forceinline__ void LoadW(Cursor<Shape::kWStages>& w) const {
    // W is read once, but for the bands of many rows of x.
    const auto hint =
        static_cast<uint64_t>(p_.token_tiles == 1 ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                  : cute::TMA::CacheHintSm90::EVICT_NORMAL);
    const int channel = w.step * kTileChannels;
    Element* to = shared_.ring.w[w.at.stage];
    auto* barrier = reinterpret_cast<uint64_t*>(&shared_.full_w[w.at.stage]);
    shared_.full_w[w.at.stage].arrive_and_expect_tx(
        RowBytes(p_.tile_rows + (Shape::kInStep ? kShare * p_.x_rows : 0)));
    if constexpr (Shape::kIsGated) {
      cute::SM90_TMA_LOAD_4D::copy(&p_.w, barrier, hint, to, channel, 0, 0, w.tile.row / 16);
    } else {
      cute::SM90_TMA_LOAD_2D::copy(&p_.w, barrier, hint, to, channel, w.tile.row);
    }
    w.Advance();
  }

  __device__ __forceinline__ void LoadX(Cursor<Shape::kXStages>& x) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
    const int channel = x.step * kTileChannels;
    Element* to = shared_.ring.x[x.at.stage];
    auto& full = Shape::kInStep ? shared_.full_w[x.at.stage] : shared_.full_x[x.at.stage];
    auto* barrier = reinterpret_cast<uint64_t*>(&full);
    if constexpr (!Shape::kInStep) full.arrive_and_expect_tx(RowBytes(kShare * p_.x_rows));
    if constexpr (kShare == 1) {
      cute::SM90_TMA_LOAD_2D::copy(&p_.x, barrier, kHint, to, channel, x.tile.token);
    } else {
      constexpr uint16_t kAll = (1 << kShare) - 1;
      const int first = static_cast<int>(blockIdx.x) % kShare * p_.x_rows;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(
          &p_.x, barrier, kAll, kHint, to + first * kTileChannels, channel, x.tile.token + first);
    }
    x.Advance();
  }

  const KernelParams& p_;
  Shared<Shape>& shared_;
};

}  // namespace gloam::cuda::ordered
