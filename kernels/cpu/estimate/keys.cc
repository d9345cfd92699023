// Logits from the keys themselves.
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/estimate/candidate_blocks.h"
#include "kernels/cpu/estimate/kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/simd_targets.h"
#include "kernels/float16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/estimate/keys.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/estimate/heads-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {

// Four tokens of kHeads heads at a time; lanes are channels.
template <int kHeads, typename T>
void ExactLogits(const float* queries, const T* keys, int head_dim, float* logits, int64_t stride) {
  const hn::Rebind<T, DF> dt;
  constexpr int kVectors = kLanes < 4 ? 4 : 1;  // FoldFour wants at least four values
  for (int token = 0; token < kBlockTokens; token += 4) {
    VF sums[kHeads][4][kVectors];
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < 4; ++t) {
        for (int v = 0; v < kVectors; ++v) sums[h][t][v] = hn::Zero(df);
      }
    }
    for (int c = 0; c < head_dim; c += kLanes * kVectors) {
      GLOAM_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int at = c + v * kLanes;
        VF key[4];
        GLOAM_UNROLL
        for (int t = 0; t < 4; ++t) {
          const T* from = keys + (token + t) * head_dim + at;
          if constexpr (sizeof(T) == sizeof(float)) {
            key[t] = hn::LoadU(df, from);
          } else {
            key[t] = hn::PromoteTo(df, hn::LoadU(dt, from));
          }
        }
        GLOAM_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const VF q = hn::LoadU(df, queries + h * head_dim + at);
          GLOAM_UNROLL
          for (int t = 0; t < 4; ++t) sums[h][t][v] = hn::MulAdd(q, key[t], sums[h][t][v]);
        }
      }
    }
    GLOAM_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      FoldFour(AddOp(), sums[h], logits + h * stride + token);
    }
  }
}

template <typename T>
void EstimateExactly(const EstimateCall& call) {
  const KeyBlocks& keys = *call.keys;
  const int64_t stride = keys.num_blocks * kBlockTokens;
  const auto keys_of = [&](int64_t i) {
    return keys.kv.Keys<const T>(keys.block_table[i], keys.kv_head);
  };
  const auto prefetch = [&](int64_t i) {
    PrefetchRange(reinterpret_cast<const std::byte*>(keys_of(i)),
                  keys.kv.layout.head_run_elements() * int64_t{sizeof(T)});
  };
  ForCandidates(
      call, prefetch, [&](const int64_t* blocks, int count, const int64_t* ahead) HWY_ATTR {
        ForHeadTiles(call.num_heads, [&](int head, auto heads) HWY_ATTR {
          for (int b = 0; b < count; ++b) {
            if (head == 0 && ahead[b] >= 0) prefetch(ahead[b]);
            ExactLogits<heads, T>(call.queries + head * call.channels, keys_of(blocks[b]),
                                  call.channels,
                                  call.logits + head * stride + blocks[b] * kBlockTokens, stride);
          }
        });
      });
}

void EstimateFromKeysTarget(const EstimateCall& call) {
  switch (call.keys->kv.layout.dtype) {
    case DType::kBF16:
      return EstimateExactly<hwy::bfloat16_t>(call);
    case DType::kF16:
      return EstimateExactly<hwy::float16_t>(call);
    default:  // kF32: the caller has checked
      return EstimateExactly<float>(call);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(EstimateFromKeysTarget);

void EstimateFromKeys(const EstimateCall& call) {
  HWY_DYNAMIC_DISPATCH(EstimateFromKeysTarget)(call);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
