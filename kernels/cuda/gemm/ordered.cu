// y = x W^T with bf16 weights, for any number of rows of x with one order of summation: an element
// is the sum of one or two parts of the columns (PartsOf), in ascending order, and a part is a
// single chain of wgmma's sums, 16 columns at a time, which knows neither how many rows of x there
// are nor whose rows are the instruction's. Few rows of x are bound by the time to read W, many by
// the tensor cores; a chain's link takes 90 cycles at least, so that W with few rows would be bound
// by that were it one chain.
//
// The data's way. A thread block computes tiles of some rows of W by 8 to 256 rows of x. One thread
// brings 64 channels at a time of both through rings in shared memory, of x no more rows than there
// are; a few warp groups multiply out of them. W never changes: its ring is filled before earlier
// kernels are done. A tile has as few rows of W as let every SM have its part of it; what it lacks
// of the instruction's shape costs nothing but products that nobody stores.
//   kPlain, kGated  One part. Of a gated product, 8 rows of the gate and the same 8 of the up take
//                   turns in a tile: wgmma leaves both of an element in the same thread.
//   kSplit          Up to 256 rows of x: each part has a block of a cluster. They add their sums up
//                   out of each other's shared memory.
//   kParts          More rows of x: a block computes the parts one after the other.
//   kLargest        One part. A thread keeps the largest element of each of its rows of x; y has
//                   one for each warp, or block, that multiplies by other rows of W.
// wgmma's rows, of which a warp group has 64 or 128, are W's, and x's are its columns. With more
// than 128 rows of x a tile of one part is the other way round, because then the tensor cores bound
// the time too: columns come in multiples of 8, so that fewer are in vain. 256 rows by gate and up
// of Llama-3.1-8B take 89 us so, before 96 (gated_gemm_bench, H100, 2026-11-26).
// Where x has many rows, two blocks of a cluster have neighbouring tiles of W and share what they
// read of x, and bands of tiles stay in L2 while W streams by.
//
// Bytes: those of W, for up to 256 rows of x; from L2, x for every tile. FLOPs: 2 m n k.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // all multiples of 8 columns
#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>

#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/gemm/cluster.cuh"
#include "kernels/cuda/gemm/ordered.h"
#include "kernels/cuda/gemm/ordered_tiles.cuh"
#include "kernels/cuda/gemm/ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace ordered {

// y += x without waiting for what y was; this thread alone writes there.
__device__ __forceinline__ void AddTo(float* y, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(y), "f"(x) : "memory");
}
__device__ __forceinline__ void AddTo(float2* y, const float2& x) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(y), "f"(x.x), "f"(x.y)
               : "memory");
}
__device__ __forceinline__ void AddTo(float4* y, const float4& x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(y), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// The first of the largest elements seen of a row of x, and its row of W. NaN is none.
struct Largest {
  float value = -INFINITY;
  int row = INT_MAX;

  // Rows come in ascending order.
  __device__ __forceinline__ void Take(float x, int its_row) {
    if (x > value) {
      value = x;
      row = its_row;
    }
  }
  // Of the lanes whose numbers differ in the bits from `first` to `last`.
  __device__ __forceinline__ Largest OverLanes(int first, int last) const {
    Largest found = *this;
    for (int mask = first; mask <= last; mask *= 2) {
      const float value = __shfl_xor_sync(kAllLanes, found.value, mask);
      const int row = __shfl_xor_sync(kAllLanes, found.row, mask);
      if (value > found.value || (value == found.value && row < found.row)) found = {value, row};
    }
    return found;
  }
};

// What the threads that multiply do; `thread` counts a warp group's. Sums lie as wgmma leaves them:
// of lane = 4 g + t, rows g and g + 8 of its warp's 16, columns 2t and 2t + 1 of every 8: element
// 4 i + 2 half + j is row g + 8 half and column 8 i + 2t + j; after all columns of 64 rows come the
// next 64.
template <typename Shape>
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const KernelParams& p, Shared<Shape>& shared, int group,
                                        int thread)
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
    Element* const w = shared_.ring.w[0];
    Element* const x = shared_.ring.x[0];
    const Element* own = Shape::kXFirst ? x + group_ * Shape::kOwnRows * kTileChannels
                                        : w + group_ * p_.group_rows * kTileChannels;
    const auto a = slice.partition_fragment_A(
        cute::make_tensor(cute::make_smem_ptr(own), typename Shape::LayoutA{}));
    const auto b = slice.partition_fragment_B(
        cute::make_tensor(cute::make_smem_ptr(Shape::kXFirst ? w : x), typename Shape::LayoutB{}));
    auto sums =
        cute::partition_fragment_C(mma, cute::Shape<Int<Shape::kOwnRows>, Int<Shape::kColumns>>{});
    WaitForEarlierKernels();  // they may have read y
    RingPosition<Shape::kWStages> at_w;
    RingPosition<Shape::kXStages> at_x;
    const auto next = [&] {
      const int x_stage = at_x.stage;
      const int w_stage = Shape::kInStep ? x_stage : at_w.stage;
      if constexpr (Shape::kInStep) {
        shared_.full_w[w_stage].wait(at_x.phase);
      } else {
        shared_.full_x[x_stage].wait(at_x.phase);
        shared_.full_w[w_stage].wait(at_w.phase);
        at_w.Advance();
      }
      at_x.Advance();
      return Shape::kXFirst ? StagePair{x_stage, w_stage} : StagePair{w_stage, x_stage};
    };
    const auto release = [&](StagePair stages) { Release(Shape::kXFirst ? stages.a : stages.b); };
    const auto multiply_part = [&](int part) {
      const int num_steps = FirstStep(p_, part + 1) - FirstStep(p_, part);
      MultiplyStages(mma, a, b, num_steps, sums, next, release);
    };
    if constexpr (Shape::kKind == Kind::kSplit) {
      multiply_part(static_cast<int>(blockIdx.x) % p_.num_parts);
      KeepSums(sums);
    } else if constexpr (Shape::kKind == Kind::kLargest) {
      Largest largest[kOwnTokens];
      for (Tiles<Shape> tiles(p_); !tiles.done(); tiles.Advance()) {
        multiply_part(0);
        TakeLargest(tiles.Get(), sums, largest);
      }
      StoreLargest(largest);
    } else {
      for (Tiles<Shape> tiles(p_); !tiles.done(); tiles.Advance()) {
        multiply_part(0);
        if constexpr (Shape::kKind == Kind::kParts) {
          auto total = cute::make_fragment_like(sums);
          cute::copy(sums, total);
          for (int part = 1; part < p_.num_parts; ++part) {
            multiply_part(part);
#pragma unroll
            for (int i = 0; i < Shape::kTokens / 2; ++i) total(i) += sums(i);
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
    const Tile tile = Tiles<Shape>(p_).Get();
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
  // Of kLargest, a thread's rows of x.
  static constexpr int kOwnTokens = Shape::kXFirst ? Shape::kOwnRows / 32 : Shape::kTokens / 4;

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
      for (int i = 0; i < Shape::kTokens / 8; ++i) {
        float* to = &shared_.sums[8 * i + 2 * t_][group_ * p_.group_rows + row + g_];
        to[0] = sums(4 * i + 2 * half);
        to[Shared<Shape>::kSumStride] = sums(4 * i + 2 * half + 1);
      }
    }
  }

  template <typename Sums>
  __device__ __forceinline__ void TakeLargest(const Tile& tile, const Sums& sums,
                                              Largest (&largest)[kOwnTokens]) const {
    if constexpr (Shape::kXFirst) {
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 8; ++i) {
        const int row = tile.row + 8 * i + 2 * t_;
        if (8 * i >= p_.tile_rows || row >= p_.n) return;
#pragma unroll
        for (int own = 0; own < kOwnTokens; ++own) {
          const int first = Shape::kColumns / 2 * (own / 2) + 2 * (own % 2) + 4 * i;
          largest[own].Take(sums(first), row);
          if (row + 1 < p_.n) largest[own].Take(sums(first + 1), row + 1);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.row + group_ * p_.group_rows + warp_row_ + 8 * half + g_;
        if (warp_row_ + 8 * half >= p_.group_rows || row >= p_.n) return;
#pragma unroll
        for (int own = 0; own < kOwnTokens; ++own) {
          largest[own].Take(sums(own / 2 * 4 + 2 * half + own % 2), row);
        }
      }
    }
  }

  // Over the lanes with the same rows of x.
  __device__ __forceinline__ void StoreLargest(Largest (&largest)[kOwnTokens]) const {
    const auto store = [&](int token, int at, const Largest& found) {
      if (token >= p_.m) return;
      static_cast<float*>(p_.y)[token * p_.y_stride + at] = found.value;
      p_.largest[token * p_.y_stride + at] = found.row;
    };
#pragma unroll
    for (int own = 0; own < kOwnTokens; ++own) {
      if constexpr (Shape::kXFirst) {
        const Largest found = largest[own].OverLanes(1, 2);
        const int row = 64 * (own / 2) + warp_row_ + 8 * (own % 2) + g_;
        if (t_ == 0) store(group_ * Shape::kOwnRows + row, blockIdx.x, found);
      } else {
        const Largest found = largest[own].OverLanes(4, 16);
        const int warp = (blockIdx.x * p_.num_groups + group_) * (kGroupThreads / kWarpThreads) +
                         thread_ / kWarpThreads;
        if (g_ == 0) store(own / 2 * 8 + 2 * t_ + own % 2, warp, found);
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

  __device__ __forceinline__ void PutBf16(__nv_bfloat16* y, float x) const {
    *y = __float2bfloat16(p_.accumulate ? __bfloat162float(*y) + x : x);
  }

  template <typename Sums>
  __device__ __forceinline__ void Store(const Tile& tile, Sums& sums) const {
    const int first = tile.row + group_ * p_.group_rows + warp_row_;
    if constexpr (Shape::kXFirst) {
#pragma unroll
      for (int part = 0; part < Shape::kOwnRows / 64; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = group_ * Shape::kOwnRows + 64 * part + warp_row_ + 8 * half + g_;
          StoreToken(tile, tile.token + row, Shape::kColumns / 2 * part + 2 * half, sums);
        }
      }
    } else if constexpr (Shape::kIsGated) {
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

  // Where x's rows are wgmma's: one of them. Its sums begin at `first`.
  template <typename Sums>
  __device__ __forceinline__ void StoreToken(const Tile& tile, int token, int first,
                                             const Sums& sums) const {
    if (token >= p_.m) return;
    if constexpr (Shape::kIsGated) {
      const int row = tile.row / 2 + 2 * t_;
      auto* y = static_cast<__nv_bfloat16*>(p_.y) + token * p_.y_stride + row;
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 16; ++i) {
        const int gate = first + 8 * i, up = gate + 4;
        if (16 * i >= p_.tile_rows || row + 8 * i >= p_.n) return;
        *reinterpret_cast<uint32_t*>(y + 8 * i) =
            PackBf16(SiluTimes(sums(gate), sums(up)), SiluTimes(sums(gate + 1), sums(up + 1)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 8; ++i) {
        const int row = tile.row + 8 * i + 2 * t_;
        if (8 * i >= p_.tile_rows || row >= p_.n) return;
        StorePair(token, row, {sums(first + 4 * i), sums(first + 4 * i + 1)});
      }
    }
  }

  // Elements `row` and, if there is one, `row` + 1 of a row of y.
  __device__ __forceinline__ void StorePair(int token, int row, float2 sum) const {
    const bool is_last = row + 1 == p_.n;
    if (p_.bias != nullptr) {
      sum.x += p_.bias[row];
      if (!is_last) sum.y += p_.bias[row + 1];
    }
    const int64_t at = token * p_.y_stride + row;
    if (!p_.y_is_bf16) {
      float* y = static_cast<float*>(p_.y) + at;
      if (p_.y_has_pairs) return Put(reinterpret_cast<float2*>(y), sum);
      Put(y, sum.x);
      if (!is_last) Put(y + 1, sum.y);
      return;
    }
    auto* y = static_cast<__nv_bfloat16*>(p_.y) + at;
    if (p_.y_has_pairs && !p_.accumulate) {
      *reinterpret_cast<uint32_t*>(y) = PackBf16(sum.x, sum.y);
      return;
    }
    PutBf16(y, sum.x);
    if (!is_last) PutBf16(y + 1, sum.y);
  }

  // Rows `first_row` to `first_row` + 8 of W.
  template <typename Sums>
  __device__ __forceinline__ void StoreRows(int first_row, int first_token, int half,
                                            Sums& sums) const {
    const int row = first_row + g_;
    if (p_.bias != nullptr) {
      const float bias = row < p_.n ? p_.bias[row] : 0.0f;
#pragma unroll
      for (int i = 0; i < Shape::kTokens / 8; ++i) {
        sums(4 * i + 2 * half) += bias;
        sums(4 * i + 2 * half + 1) += bias;
      }
    }
    const auto value = [&](int i, int j) { return sums(4 * i + 2 * half + j); };
    if (!p_.y_is_bf16) {
      StoreElements<float>(row, first_token, value, [&](float* y, float x) { Put(y, x); });
    } else if (p_.accumulate || !p_.y_has_pairs) {
      StoreElements<__nv_bfloat16>(row, first_token, value,
                                   [&](__nv_bfloat16* y, float x) { PutBf16(y, x); });
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
    for (int i = 0; i < Shape::kTokens / 8; ++i) {
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
    for (int i = 0; i < Shape::kTokens / 8; ++i) {
      const uint32_t pair = Transpose8x8(PackBf16(value(i, 0), value(i, 1)));
      if (row < p_.n && own_token + 8 * i < p_.m) {
        *reinterpret_cast<uint32_t*>(y + 8 * i * p_.y_stride) = pair;
      }
    }
  }

  const KernelParams& p_;
  Shared<Shape>& shared_;
  const int group_;
  const int thread_;
  const int warp_row_;  // of the group's
  const int g_, t_;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, 1)
    OrderedGemmKernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<Shape>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kWStages; ++i) shared.full_w[i].init(1);
    for (int i = 0; i < Shape::kXStages; ++i) {
      if constexpr (!Shape::kInStep) shared.full_x[i].init(1);
      shared.empty[i].init(p.num_groups * Shape::kShare);
    }
    cutlass::arch::fence_barrier_init();
  }
  AllowNextKernel();
  cute::cluster_sync();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  Multiplier<Shape> multiplier(p, shared, group, static_cast<int>(threadIdx.x) % kGroupThreads);
  if (group < p.num_groups) {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_alloc<232>();
    multiplier.Run();
  } else {
    if constexpr (Shape::kMovesRegisters) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x % kGroupThreads == 0) Loader<Shape>(p, shared).Run();
    __syncwarp();
  }
  if constexpr (Shape::kKind == Kind::kSplit) {
    cute::cluster_sync();
    if (group < p.num_groups) multiplier.WriteSummed();
  }
  // A block's barriers and memory are there as long as another may use them.
  cute::cluster_sync();
}

namespace {

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Parts of the columns that are summed by themselves, where y is fp32. On an H100 (2026-11-26), us
// by 1, 64 and 2048 rows of x, as one chain and in two parts: down of Llama-3.1-8B (4096 x 14336)
// 49, 63, 310 and 41, 43, 383, o (4096 x 4096) 15.5, 23, 114 and 14.7, 16.4, 150. Four parts, and x
// read once for two or four tiles of 256 of its rows, are no faster: of the 132 SMs clusters of
// four and eight blocks fill 120, and tiles of 64 by 256 rows are bound by the way to shared
// memory.
int PartsOf(const PlainProduct& product) {
  if (product.y_is_bf16 || product.n > kMaxPartedRows) return 1;
  return std::min(kMaxParts, CeilDiv(product.k, kTileChannels));
}

// How W's rows are cut into tiles.
struct RowShape {
  int num_groups;
  int group_rows;  // where they are wgmma's
  int tile_rows;
  int row_units;  // of `share` tiles
};

constexpr int kRoundRows = 8;  // a round of tiles costs as much as a few rows

// Rows of W are wgmma's, `num_groups` times `group_rows` of a tile, a multiple of the unit. The
// least work of the busiest block: in rows of W and x that it reads, or multiplies in the time that
// reading as many takes.
RowShape FindRowShape(int64_t num_rows, int unit_rows, int tokens, int token_tiles, int share,
                      int num_clusters) {
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
        best = {groups, rows, groups * rows, units};
      }
    }
  }
  return best;
}

// Rows of W are wgmma's columns: those of a tile, with which the busiest block has the least.
int FindTileRows(int64_t num_rows, int unit_rows, int most, int token_tiles, int share,
                 int num_clusters) {
  int best = 0, least = 0;
  for (int rows = unit_rows; rows <= most; rows += unit_rows) {
    const int64_t units = CeilDiv(num_rows, rows * share);
    const int cost = CeilDiv(units * token_tiles, num_clusters) * (rows + kRoundRows);
    if (least == 0 || cost <= least) {
      least = cost;
      best = rows;
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
  const uintptr_t pair_bytes = product.y_is_bf16 ? 4 : 8;
  return product.n % 2 == 0 && product.y_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(product.y) % pair_bytes == 0;
}

// Of W: of a gated product the gate's and the up's.
template <typename Shape>
RowShape FindShape(const PlainProduct& product, int token_tiles, int num_clusters) {
  const int64_t num_rows = Shape::kIsGated ? 2 * product.n : product.n;
  constexpr int kUnitRows = Shape::kIsGated ? 16 : 8;
  if constexpr (Shape::kXFirst) {
    const int rows = FindTileRows(num_rows, kUnitRows, Shape::kTileRows, token_tiles, Shape::kShare,
                                  num_clusters);
    return {Shape::kMostGroups, 0, rows, CeilDiv(num_rows, rows * Shape::kShare)};
  } else {
    return FindRowShape(num_rows, kUnitRows, Shape::kTokens, token_tiles, Shape::kShare,
                        num_clusters);
  }
}

// Returns how many elements a row of y gets.
template <typename Shape>
int Launch(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  constexpr auto kKernel = OrderedGemmKernel<Shape>;
  constexpr int kMaxSharedBytes = 227 << 10;
  constexpr bool kIsGated = Shape::kIsGated;
  AllowSharedBytes<kKernel>(kMaxSharedBytes);
  // A block an SM.
  static const ClusterCounts max_clusters =
      MaxClusters(kKernel, Shape::kMaxThreads, kMaxSharedBytes, num_sms);
  KernelParams p = {};
  p.num_parts = kIsGated ? 1 : PartsOf(product);
  p.token_tiles = CeilDiv(product.m, Shape::kTokens);
  const int cluster_blocks = Shape::kKind == Kind::kSplit ? p.num_parts : Shape::kShare;
  const int num_clusters = cluster_blocks == 1 ? num_sms : max_clusters[cluster_blocks];
  const RowShape rows = FindShape<Shape>(product, p.token_tiles, num_clusters);
  p.num_groups = rows.num_groups;
  p.tile_rows = rows.tile_rows;
  p.group_rows = rows.group_rows;
  p.row_units = rows.row_units;
  p.x_rows = XRows(product.m, Shape::kTokens, Shape::kShare);
  const int64_t n = product.n, k = product.k;
  if constexpr (kIsGated) {
    p.w = MakeTensorMap<4>(product.w, {k, 8, 2, n / 8}, {k, n * k, 8 * k},
                           {kTileChannels, 8, 2, p.tile_rows / 16});
  } else {
    p.w = MakeTensorMap<2>(product.w, {k, n}, {k}, {kTileChannels, p.tile_rows});
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
  const int grid_clusters =
      Shape::kKind == Kind::kSplit ? num_units : std::min(num_units, num_clusters);
  const int num_blocks = grid_clusters * cluster_blocks;
  int num_columns = p.n;
  if constexpr (Shape::kKind == Kind::kLargest) {
    constexpr int kGroupWarps = kGroupThreads / kWarpThreads;
    num_columns = Shape::kXFirst ? num_blocks : num_blocks * p.num_groups * kGroupWarps;
    GLOAM_CHECK(2 * num_columns <= p.n);
    p.y_stride = num_columns;
    p.largest = static_cast<int32_t*>(p.y) + product.m * num_columns;
  }
  LaunchKernel(kKernel,
               {dim3(num_blocks), dim3(p.num_groups * kGroupThreads + Shape::kLoadThreads),
                sizeof(Shared<Shape>), cluster_blocks},
               stream, p);
  return num_columns;
}

// More than 128 rows of x, which are wgmma's rows.
template <int kTokens, Kind kKind>
int LaunchXFirst(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  // About as many columns as a tile has rows of W: those in vain cost as much as the others.
  constexpr bool kIsGated = kKind == Kind::kGated;
  const int rows = FindTileRows(kIsGated ? 2 * product.n : product.n, kIsGated ? 16 : 8,
                                kMaxTileRows, CeilDiv(product.m, kTokens), 2, num_sms / 2);
  if constexpr (kIsGated) {
    if (rows <= 96) return Launch<Config<kTokens, kKind, 96>>(product, num_sms, stream);
    if (rows <= 112) return Launch<Config<kTokens, kKind, 112>>(product, num_sms, stream);
  } else if constexpr (kKind == Kind::kPlain) {
    if (rows <= 64) return Launch<Config<kTokens, kKind, 64>>(product, num_sms, stream);
  }
  return Launch<Config<kTokens, kKind>>(product, num_sms, stream);
}

template <Kind kKind>
int LaunchForRows(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  if constexpr (kKind != Kind::kSplit) {
    if (product.m > 192) return LaunchXFirst<256, kKind>(product, num_sms, stream);
    if (product.m > 128) return LaunchXFirst<192, kKind>(product, num_sms, stream);
  } else if (product.m > 128) {
    return Launch<Config<256, kKind>>(product, num_sms, stream);
  }
  const auto launch = product.m <= 8    ? Launch<Config<8, kKind>>
                      : product.m <= 16 ? Launch<Config<16, kKind>>
                      : product.m <= 32 ? Launch<Config<32, kKind>>
                      : product.m <= 64 ? Launch<Config<64, kKind>>
                                        : Launch<Config<128, kKind>>;
  return launch(product, num_sms, stream);
}

bool IsSound(const PlainProduct& product) {
  return product.m > 0 && product.n > 0 && product.k > 0 && product.k % 8 == 0 &&
         product.x_stride % 8 == 0;
}

}  // namespace
}  // namespace ordered

void MultiplyOrdered(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  using ordered::Kind;
  GLOAM_CHECK(ordered::IsSound(product));
  if (ordered::PartsOf(product) == 1) {
    ordered::LaunchForRows<Kind::kPlain>(product, num_sms, stream);
  } else if (product.m <= 256) {
    ordered::LaunchForRows<Kind::kSplit>(product, num_sms, stream);
  } else {  // sums and totals fill the registers
    ordered::Launch<ordered::Config<192, Kind::kParts>>(product, num_sms, stream);
  }
}

LogitRows FindLargest(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(ordered::IsSound(product) && product.m <= 256 && product.n >= kMinGreedyRows &&
              !product.y_is_bf16);
  const int num_columns = ordered::LaunchForRows<ordered::Kind::kLargest>(product, num_sms, stream);
  auto* const values = static_cast<float*>(product.y);
  return {.values =
              TensorView::Contiguous(values, DType::kF32, Device::kCuda, {product.m, num_columns}),
          .tokens = reinterpret_cast<const int32_t*>(values + product.m * num_columns)};
}

void MultiplyOrderedGated(const PlainProduct& product, int num_sms, cudaStream_t stream) {
  GLOAM_CHECK(ordered::IsSound(product) && product.n % 8 == 0 && product.y_is_bf16 &&
              !product.accumulate && product.bias == nullptr && ordered::HasPairs(product));
  ordered::LaunchForRows<ordered::Kind::kGated>(product, num_sms, stream);
}

}  // namespace gloam::cuda
