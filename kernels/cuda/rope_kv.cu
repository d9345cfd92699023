// Rotary position embedding and the append to the paged cache: one kernel over Q, K and V. Reads
// 2 or 4 bytes per element of the fused QKV row and writes the cache's type: bound by memory
// traffic at many tokens, by latency at few.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vectors.cuh"

namespace gloam::cuda {
namespace {

// Of Q, K or V: [num_tokens, heads, head_dim] fp32 or bf16, strides in elements.
struct HeadsIn {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct RopeKvKernelParams {
  HeadsIn q, k, v;
  void* q_out;  // [num_tokens, num_heads, head_dim]
  int64_t q_out_token_stride;
  int64_t q_out_head_stride;
  const int32_t* positions;     // [num_tokens]
  const int64_t* slot_mapping;  // [num_tokens]
  const float* cos;             // [max_positions, half]
  const float* sin;             // [max_positions, half]
  void* cache;                  // [num_blocks][K|V][num_kv_heads][16][head_dim]
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int half;  // rotary_dim / 2
  bool interleaved;
};

// Conversions to the types of the cache and of queries over it: nearest, ties to even. fp16 and fp8
// saturate: an infinity in a key or a value would make a whole answer NaN.
struct ToBf16 {
  using Query = ToBf16;
  using Storage = uint16_t;
  __device__ static uint16_t Convert(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
};
struct ToF16 {
  using Query = ToF16;
  using Storage = uint16_t;
  __device__ static uint16_t Convert(float x) {
    constexpr float kMax = 65504.0f;
    const float clamped = fminf(fmaxf(x, -kMax), kMax);
    return __half_as_ushort(__float2half_rn(isnan(x) ? x : clamped));
  }
};
struct ToF8 {
  using Query = ToF16;
  using Storage = uint8_t;
  __device__ static uint8_t Convert(float x) {
    return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  }
};

template <int kCount>
struct Floats {
  float x[kCount];
};

template <int kCount>
__device__ __forceinline__ Floats<kCount> Load(const float* from) {
  Floats<kCount> values;
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      values.x[i] = four.x;
      values.x[i + 1] = four.y;
      values.x[i + 2] = four.z;
      values.x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.x[i] = from[i];
  }
  return values;
}

template <int kCount>
__device__ __forceinline__ Floats<kCount> Load(const __nv_bfloat16* from) {
  Floats<kCount> values;
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint2 four = *reinterpret_cast<const uint2*>(from + i);
      const float2 low = UnpackBf16(four.x), high = UnpackBf16(four.y);
      values.x[i] = low.x;
      values.x[i + 1] = low.y;
      values.x[i + 2] = high.x;
      values.x[i + 3] = high.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.x[i] = __bfloat162float(from[i]);
  }
  return values;
}

template <typename To, int kCount>
__device__ __forceinline__ void Store(typename To::Storage* to, const Floats<kCount>& values) {
  struct alignas(kCount * sizeof(typename To::Storage)) Packed {
    typename To::Storage x[kCount];
  } packed;
#pragma unroll
  for (int i = 0; i < kCount; ++i) packed.x[i] = To::Convert(values.x[i]);
  *reinterpret_cast<Packed*>(to) = packed;
}

// 2 * kVec channels of one head: where they are and what they hold.
template <int kVec>
struct Pieces {
  int first;   // channel of low.x[0]
  int second;  // channel of high.x[0]
  Floats<kVec> low, high;
};

// The rotation of two channels, rounded as the CPU's.
__device__ __forceinline__ void Rotate(float& a, float& b, float cos, float sin) {
  const float x0 = a, x1 = b;
  a = __fmaf_rn(-x1, sin, __fmul_rn(x0, cos));
  b = __fmaf_rn(x0, sin, __fmul_rn(x1, cos));
}

// Item `item` of a head: 2 * kVec channels. The first half / kVec items are rotated.
template <int kVec>
__device__ __forceinline__ Pieces<kVec> PlacesOf(int item, int half, bool interleaved) {
  Pieces<kVec> pieces;
  if (item * kVec < half && !interleaved) {
    pieces.first = item * kVec;
    pieces.second = half + item * kVec;
  } else {
    pieces.first = 2 * item * kVec;
    pieces.second = pieces.first + kVec;
  }
  return pieces;
}

template <int kVec>
__device__ __forceinline__ void RotatePieces(Pieces<kVec>& pieces, const Floats<kVec>& cos,
                                             const Floats<kVec>& sin, bool interleaved) {
  if (!interleaved || kVec == 1) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) Rotate(pieces.low.x[i], pieces.high.x[i], cos.x[i], sin.x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    Rotate(pieces.low.x[2 * i], pieces.low.x[2 * i + 1], cos.x[i], sin.x[i]);
    Rotate(pieces.high.x[2 * i], pieces.high.x[2 * i + 1], cos.x[kVec / 2 + i],
           sin.x[kVec / 2 + i]);
  }
}

constexpr int kThreads = 256;

// A thread per 2 * kVec channels of one head of Q, K or V. grid: [tokens, pieces of kThreads]
template <typename From, typename To, int kVec>
__global__ void __launch_bounds__(kThreads) RopeKvKernel(RopeKvKernelParams p) {
  const int64_t token = blockIdx.x;
  const int items_per_head = p.head_dim / (2 * kVec);
  const int thread = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  const int head = thread / items_per_head;
  const int item = thread - head * items_per_head;
  const int first_v = p.num_heads + p.num_kv_heads;
  // Positions, slots and tables are copied before a step, not written by kernels: no need to wait.
  const bool in_range = head < first_v + p.num_kv_heads;
  const bool rotated = in_range && head < first_v && item * kVec < p.half;
  Floats<kVec> cos = {}, sin = {};
  if (rotated) {
    const int64_t at = int64_t{p.positions[token]} * p.half + item * kVec;
    cos = Load<kVec>(p.cos + at);
    sin = Load<kVec>(p.sin + at);
  }
  const int64_t slot = p.slot_mapping[token];
  AllowNextKernel();
  WaitForEarlierKernels();
  if (!in_range || (head >= p.num_heads && slot < 0)) return;

  const bool is_q = head < p.num_heads;
  const int kv_head = head - (head < first_v ? p.num_heads : first_v);
  const HeadsIn& in = is_q ? p.q : head < first_v ? p.k : p.v;
  const From* from = static_cast<const From*>(in.data) + token * in.token_stride +
                     int64_t{is_q ? head : kv_head} * in.head_stride;
  Pieces<kVec> pieces = PlacesOf<kVec>(item, head < first_v ? p.half : 0, p.interleaved);
  pieces.low = Load<kVec>(from + pieces.first);
  pieces.high = Load<kVec>(from + pieces.second);
  if (rotated) RotatePieces(pieces, cos, sin, p.interleaved);

  if (is_q) {
    using Query = typename To::Query;
    auto* to = static_cast<typename Query::Storage*>(p.q_out) + token * p.q_out_token_stride +
               head * p.q_out_head_stride;
    Store<Query>(to + pieces.first, pieces.low);
    Store<Query>(to + pieces.second, pieces.high);
    return;
  }
  const int64_t run =
      (slot / kBlockTokens * 2 + (head < first_v ? 0 : 1)) * p.num_kv_heads + kv_head;
  auto* to = static_cast<typename To::Storage*>(p.cache) +
             (run * kBlockTokens + slot % kBlockTokens) * p.head_dim;
  Store<To>(to + pieces.first, pieces.low);
  Store<To>(to + pieces.second, pieces.high);
}

HeadsIn InputOf(const TensorView& x) { return {x.data, x.strides[0], x.strides[1]}; }

bool ByFour(const HeadsIn& x) {
  return IsAligned16(x.data) && x.token_stride % 4 == 0 && x.head_stride % 4 == 0;
}

template <typename From, typename To>
void Launch(const RopeKvKernelParams& p, int num_tokens, cudaStream_t stream) {
  const bool by_four = p.head_dim % 8 == 0 && p.half % 4 == 0 && ByFour(p.q) && ByFour(p.k) &&
                       ByFour(p.v) && IsAligned16(p.q_out) && p.q_out_token_stride % 4 == 0 &&
                       p.q_out_head_stride % 4 == 0 && IsAligned16(p.cos) && IsAligned16(p.sin) &&
                       IsAligned16(p.cache);
  const int vec = by_four ? 4 : 1;
  const int items = (p.num_heads + 2 * p.num_kv_heads) * (p.head_dim / (2 * vec));
  const LaunchShape shape = {dim3(num_tokens, (items + kThreads - 1) / kThreads), kThreads};
  LaunchKernel(by_four ? RopeKvKernel<From, To, 4> : RopeKvKernel<From, To, 1>, shape, stream, p);
}

template <typename From>
void LaunchFor(DType cache, const RopeKvKernelParams& p, int num_tokens, cudaStream_t stream) {
  switch (cache) {
    case DType::kBF16:
      return Launch<From, ToBf16>(p, num_tokens, stream);
    case DType::kF16:
      return Launch<From, ToF16>(p, num_tokens, stream);
    case DType::kF8E4M3:
      return Launch<From, ToF8>(p, num_tokens, stream);
    default:
      GLOAM_CHECK(!"the cache on CUDA is bf16, fp16 or fp8 (e4m3)");
  }
}

void CheckParams(const RopeKvParams& params) {
  const int64_t num_tokens = params.batch.num_tokens;
  const KvLayout& layout = params.kv.layout;
  const TensorView& q = params.q;
  GLOAM_CHECK(q.rank == 3 && params.k.rank == 3 && params.v.rank == 3);
  GLOAM_CHECK(q.shape[0] == num_tokens && q.shape[2] == layout.head_dim);
  GLOAM_CHECK(params.k.shape[0] == num_tokens && params.k.shape[1] == layout.num_kv_heads &&
              params.k.shape[2] == layout.head_dim);
  GLOAM_CHECK(params.v.shape == params.k.shape);
  GLOAM_CHECK(q.dtype == DType::kF32 || q.dtype == DType::kBF16);
  GLOAM_CHECK(params.k.dtype == q.dtype && params.v.dtype == q.dtype);
  GLOAM_CHECK(params.q_out.data != nullptr && params.q_out.shape == q.shape);
  GLOAM_CHECK(params.q_out.dtype == QueryDType(layout.dtype));
  GLOAM_CHECK(layout.head_dim % 2 == 0);
  GLOAM_CHECK(params.rotary_dim >= 0 && params.rotary_dim % 2 == 0 &&
              params.rotary_dim <= layout.head_dim);
}

}  // namespace

void RopeAppendKv(const RopeKvParams& params, const DeviceContext& context) {
  CheckParams(params);
  if (params.batch.num_tokens == 0) return;
  RopeKvKernelParams p = {};
  p.q = InputOf(params.q);
  p.k = InputOf(params.k);
  p.v = InputOf(params.v);
  p.q_out = params.q_out.data;
  p.q_out_token_stride = params.q_out.strides[0];
  p.q_out_head_stride = params.q_out.strides[1];
  p.positions = params.batch.positions;
  p.slot_mapping = params.batch.slot_mapping;
  p.cos = params.cos;
  p.sin = params.sin;
  p.cache = params.kv.data;
  p.num_heads = static_cast<int>(params.q.shape[1]);
  p.num_kv_heads = params.kv.layout.num_kv_heads;
  p.head_dim = params.kv.layout.head_dim;
  p.half = params.rotary_dim / 2;
  p.interleaved = params.style == RopeStyle::kInterleaved;
  const auto launch = params.q.dtype == DType::kBF16 ? LaunchFor<__nv_bfloat16> : LaunchFor<float>;
  launch(params.kv.layout.dtype, p, params.batch.num_tokens, context.stream);
}

}  // namespace gloam::cuda
