// Logits from mirrors with quants per token, labels included: the weights are the queries, the same
// for all blocks.
#include <algorithm>

#include "kernels/cpu/estimate/candidate_blocks.h"
#include "kernels/cpu/estimate/kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/sidecars/quant_rows.h"
#include "kernels/cpu/simd_targets.h"
#include "kernels/estimate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/estimate/token_quants.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/estimate/products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// What becomes of the sums of a block: logits, with a scale and, if any, a minimum per token.
struct StoreTokenLogits {
  StoreLogits out;
  const float* token_scales;   // [16]
  const float* token_minima;   // [16]; zeros when symmetric
  const float* query_sums;     // [kTileHeads]
  const float* query_offsets;  // [kTileHeads] taken from the sum before the token's scale

  void operator()(int h, int strip, VF dot) const {
    const VF constant = hn::Set(df, out.weights->constants[h] - query_offsets[h]);
    const VF sum = hn::Add(hn::Mul(dot, hn::Set(df, out.weights->scales[h])), constant);
    const VF scaled = hn::Mul(sum, hn::Load(df, token_scales + strip * kLanes));
    const VF minimum =
        hn::Mul(hn::Load(df, token_minima + strip * kLanes), hn::Set(df, query_sums[h]));
    hn::StoreU(hn::Add(scaled, minimum), df, out.logits + h * out.stride + strip * kLanes);
  }
};

template <typename DotT, int kBits>
void EstimateTokenQuant(const EstimateCall& call, const Mirror& mirror) {
  constexpr int kPlanes = 2;
  struct Tile {
    IntegerWeights weights;
    float sums[kTileHeads];
    float offsets[kTileHeads];
  };
  const bool symmetric = mirror.kind == SidecarKind::kMaxQuant;
  const KeyBlocks& keys = *call.keys;
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const auto mirror_of = [&](int64_t i) {
    return keys.sidecars.At(mirror.kind, keys.block_table[i], keys.kv_head);
  };
  alignas(64) float ones[kMaxSidecarHeadDim];
  alignas(64) float centres[kMaxSidecarHeadDim];
  std::fill_n(ones, call.channels, 1.0f);
  std::fill_n(centres, call.channels, CentreOf(kBits));
  Tile tiles[kMaxGroupHeads / kTileHeads];
  ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
    Tile& tile = tiles[head / kTileHeads];
    const float* queries = call.queries + head * call.channels;
    WeightSums sums;
    SumWeights<heads>(queries, call.channels, ones, centres, sums);
    RoundWeights<heads, kPlanes>(queries, call.channels, ones, sums, CentreOf(kBits), tile.weights);
    for (int h = 0; h < heads; ++h) {
      tile.sums[h] = 0;
      for (int c = 0; c < call.channels; ++c) tile.sums[h] += queries[h * call.channels + c];
      tile.offsets[h] = symmetric ? tile.sums[h] * static_cast<float>(1 << (kBits - 1)) : 0.0f;
    }
  });
  const auto prefetch = [&](int64_t i) {
    PrefetchRange(mirror_of(i), kTokenQuantOffset + int64_t{mirror.num_rows} * kQuantRowBytes);
  };
  const auto compute = [&](int64_t i) HWY_ATTR {
    const std::byte* data = mirror_of(i);
    const hn::Rebind<hwy::float16_t, DF> d16;
    const auto* halves = reinterpret_cast<const hwy::float16_t*>(data);
    alignas(64) float scales[kBlockTokens], minima[kBlockTokens];
    for (int t = 0; t < kBlockTokens; t += kLanes) {
      hn::Store(hn::PromoteTo(df, hn::Load(d16, halves + t)), df, scales + t);
      hn::Store(hn::PromoteTo(df, hn::Load(d16, halves + kBlockTokens + t)), df, minima + t);
    }
    ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
      const Tile& tile = tiles[head / kTileHeads];
      float* logits = call.logits + head * stride + i * kBlockTokens;
      const StoreTokenLogits store = {
          {&tile.weights, logits, stride}, scales, minima, tile.sums, tile.offsets};
      MultiplyRows<DotT, kBits, kPlanes, heads>(data + kTokenQuantOffset, mirror.num_rows,
                                                tile.weights, store);
    });
  };
  ForCandidates(call, prefetch,
                [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
                  for (int b = 0; b < count; ++b) {
                    if (ahead[b] >= 0) prefetch(ahead[b]);
                    compute(blocks[b]);
                  }
                });
}

void EstimateFromTokenQuantsTarget(const EstimateCall& call, const Mirror& mirror) {
  WithDotAndBits(mirror.bits, [&](auto dot, auto bits) HWY_ATTR {
    EstimateTokenQuant<decltype(dot), bits>(call, mirror);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(EstimateFromTokenQuantsTarget);

void EstimateFromTokenQuants(const EstimateCall& call, const Mirror& mirror) {
  HWY_DYNAMIC_DISPATCH(EstimateFromTokenQuantsTarget)(call, mirror);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
