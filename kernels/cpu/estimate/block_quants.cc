// Logits from mirrors with quants per channel: each block has ranges, and so weights, of its own.
//
// Per block and head of 64 channels at 4 bits: 768 bytes (bf16 ranges) read once for all heads,
// 1,024 multiply-adds a head.
#include "kernels/cpu/estimate/candidate_blocks.h"
#include "kernels/cpu/estimate/kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/sidecars/quant_rows.h"
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/estimate/block_quants.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/estimate/products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// Steps and middles of a block's channels from its ranges.
template <typename T>
void LoadRangesOf(const std::byte* ranges, int head_dim, int bits, float* steps, float* mids) {
  const hn::Rebind<T, DF> dt;
  const auto* min = reinterpret_cast<const T*>(ranges);
  const VF half = hn::Set(df, 0.5f);
  const VF factor = hn::Set(df, 2.0f / static_cast<float>((1 << bits) - 1));
  const auto load = [&](const T* from) HWY_ATTR {
    if constexpr (sizeof(T) == sizeof(float)) {
      return hn::Mul(hn::LoadU(df, from), half);
    } else {
      return hn::Mul(hn::PromoteTo(df, hn::LoadU(dt, from)), half);
    }
  };
  for (int c = 0; c < head_dim; c += kLanes) {
    const VF low = load(min + c);
    const VF high = load(min + head_dim + c);
    hn::Store(hn::Mul(hn::Sub(high, low), factor), df, steps + c);
    hn::Store(hn::Add(high, low), df, mids + c);
  }
}

void LoadRanges(DType dtype, const std::byte* ranges, int head_dim, int bits, float* steps,
                float* mids) {
  switch (dtype) {
    case DType::kBF16:
      return LoadRangesOf<hwy::bfloat16_t>(ranges, head_dim, bits, steps, mids);
    case DType::kF16:
      return LoadRangesOf<hwy::float16_t>(ranges, head_dim, bits, steps, mids);
    default:  // kF32: the caller has checked
      return LoadRangesOf<float>(ranges, head_dim, bits, steps, mids);
  }
}

// What a batch of blocks goes through, step by step.
struct BlockBatch {
  alignas(64) float steps[kBatchBlocks][kMaxSidecarHeadDim];
  alignas(64) float mids[kBatchBlocks][kMaxSidecarHeadDim];
  WeightSums sums[kBatchBlocks];
  IntegerWeights weights[kBatchBlocks];
};

// kChannels: of all calls; 0: any number.
template <typename DotT, int kBits, int kChannels>
void EstimateBlockQuant(const EstimateCall& call, const Mirror& mirror) {
  constexpr int kPlanes = kBits == 8 ? 2 : 1;
  const KeyBlocks& keys = *call.keys;
  const int channels = kChannels == 0 ? call.channels : kChannels;
  const int num_rows = kChannels == 0 ? mirror.num_rows : kChannels / QuantRowChannels(kBits);
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const DType dtype = keys.kv.layout.dtype;
  const int64_t range_bytes = 2 * channels * static_cast<int64_t>(DTypeBytes(dtype));
  const auto quants_of = [&](int64_t i) {
    return keys.sidecars.At(SidecarKind::kBlockQuant, keys.block_table[i], keys.kv_head);
  };
  // What is fetched of a block, in parts.
  const int64_t half_bytes = int64_t{(num_rows + 1) / 2} * kQuantRowBytes;
  const auto fetch_ranges = [&](int64_t i) {
    if (i >= 0) PrefetchRange(keys.Ranges(i), range_bytes);
  };
  const auto fetch_quants = [&](int64_t i, int half) {
    if (i >= 0) PrefetchRange(quants_of(i) + half * half_bytes, half_bytes);
  };
  const auto prefetch = [&](int64_t i) {
    fetch_ranges(i);
    fetch_quants(i, 0);
    fetch_quants(i, 1);
  };
  BlockBatch batch;
  ForCandidates(
      call, prefetch, [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
        for (int b = 0; b < count; ++b) {
          LoadRanges(dtype, keys.Ranges(blocks[b]), channels, kBits, batch.steps[b], batch.mids[b]);
        }
        ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
          const float* queries = call.queries + head * channels;
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_ranges(ahead[b]);
            SumWeights<heads>(queries, channels, batch.steps[b], batch.mids[b], batch.sums[b]);
          }
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_quants(ahead[b], 0);
            RoundWeights<heads, kPlanes>(queries, channels, batch.steps[b], batch.sums[b],
                                         CentreOf(kBits), batch.weights[b]);
          }
          for (int b = 0; b < count; ++b) {
            if (head == 0) fetch_quants(ahead[b], 1);
            float* logits = call.logits + head * stride + blocks[b] * kBlockTokens;
            const StoreLogits store = {&batch.weights[b], logits, stride};
            if constexpr (kBits == 4 && kStrips == 2 && heads <= 3) {
              MultiplyNibbles<DotT, heads>(quants_of(blocks[b]), num_rows, batch.weights[b], store);
            } else {
              MultiplyRows<DotT, kBits, kPlanes, heads>(quants_of(blocks[b]), num_rows,
                                                        batch.weights[b], store);
            }
          }
        });
      });
}

template <typename DotT, int kBits>
void EstimateOfBits(const EstimateCall& call, const Mirror& mirror) {
  if constexpr (kBits == 4) {  // what the default policy and small models use
    if (call.channels == 64) return EstimateBlockQuant<DotT, kBits, 64>(call, mirror);
  }
  EstimateBlockQuant<DotT, kBits, 0>(call, mirror);
}

void EstimateFromBlockQuantsTarget(const EstimateCall& call, const Mirror& mirror) {
  WithDotAndBits(mirror.bits, [&](auto dot, auto bits)
                                  HWY_ATTR { EstimateOfBits<decltype(dot), bits>(call, mirror); });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(EstimateFromBlockQuantsTarget);

void EstimateFromBlockQuants(const EstimateCall& call, const Mirror& mirror) {
  HWY_DYNAMIC_DISPATCH(EstimateFromBlockQuantsTarget)(call, mirror);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
