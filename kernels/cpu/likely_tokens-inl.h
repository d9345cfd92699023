// LikelyTokens, once per instruction set: keys and values of tokens that pruning will likely keep
// are fetched beside the estimates. On the thread that estimates.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/candidate_blocks.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/estimate.h"

#if defined(GLOAM_LIKELY_TOKENS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef GLOAM_LIKELY_TOKENS_INL_H
#undef GLOAM_LIKELY_TOKENS_INL_H
#else
#define GLOAM_LIKELY_TOKENS_INL_H
#endif

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// A token whose logit is this close to its head's largest is fetched: most of what top-p and
// keep_weight keep, and little beside it.
constexpr float kLikelyDistance = 5.0f;

// The tokens of a batch of blocks that will likely be kept. Their keys and values are fetched while
// the next batch is computed: nothing else foresees them, and pruning leaves the memory idle.
class LikelyTokens {
 public:
  explicit LikelyTokens(const EstimateCall& call)
      : call_(call),
        row_bytes_(call.channels * static_cast<int64_t>(DTypeBytes(call.keys->kv.layout.dtype))),
        values_offset_(call.keys->kv.layout.num_kv_heads * kBlockTokens * row_bytes_) {
    if (call.largest_logits == nullptr) return;
    for (int h = 0; h < call.num_heads; ++h) {
      largest_[h] = Shared(h).load(std::memory_order_relaxed);
    }
  }
  ~LikelyTokens() {
    if (call_.largest_logits == nullptr) return;
    for (int i = 0; i < kBatchBlocks; ++i) Fetch();
    for (int h = 0; h < call_.num_heads; ++h) {
      if (largest_[h] > Shared(h).load(std::memory_order_relaxed)) {
        Shared(h).store(largest_[h], std::memory_order_relaxed);
      }
    }
  }
  LikelyTokens(const LikelyTokens&) = delete;
  LikelyTokens& operator=(const LikelyTokens&) = delete;

  // Finds those of some blocks whose logits are there.
  void Find(const int64_t* blocks, int count) {
    if (call_.largest_logits == nullptr) return;
    const hn::CappedTag<float, kBlockTokens> d;
    const int lanes = static_cast<int>(hn::MaxLanes(d));
    uint32_t found[kBatchBlocks] = {};
    const int64_t stride = call_.keys->num_blocks * kBlockTokens;
    for (int h = 0; h < call_.num_heads; ++h) {
      const float* logits = call_.logits + h * stride;
      auto max = hn::Set(d, largest_[h]);
      for (int b = 0; b < count; ++b) {
        for (int s = 0; s < kBlockTokens; s += lanes) {
          max = hn::Max(max, hn::LoadU(d, logits + blocks[b] * kBlockTokens + s));
        }
      }
      largest_[h] = hn::GetLane(hn::MaxOfLanes(d, max));
      const auto limit = hn::Set(d, largest_[h] - kLikelyDistance);
      for (int b = 0; b < count; ++b) {
        for (int s = 0; s < kBlockTokens; s += lanes) {
          const auto logit = hn::LoadU(d, logits + blocks[b] * kBlockTokens + s);
          uint8_t bits[8] = {};
          hn::StoreMaskBits(d, hn::Ge(logit, limit), bits);
          found[b] |= (bits[0] | uint32_t{bits[1]} << 8) << s;
        }
      }
    }
    next_ = count_ = 0;
    for (int b = 0; b < count; ++b) {
      const int64_t block = call_.keys->block_table[blocks[b]];
      const std::byte* keys = static_cast<const std::byte*>(call_.keys->kv.data) +
                              block * call_.keys->kv.layout.block_bytes() +
                              call_.keys->kv_head * kBlockTokens * row_bytes_;
      for (uint32_t left = found[b]; left != 0; left &= left - 1) {
        rows_[count_++] = keys + std::countr_zero(left) * row_bytes_;
      }
    }
    per_fetch_ = (count_ + kBatchBlocks - 1) / kBatchBlocks;
  }

  // Asks for some of the tokens found; kBatchBlocks times for all.
  void Fetch() {
    for (const int end = std::min(next_ + per_fetch_, count_); next_ < end; ++next_) {
      PrefetchRange(rows_[next_], row_bytes_);
      PrefetchRange(rows_[next_] + values_offset_, row_bytes_);
    }
  }

 private:
  std::atomic_ref<float> Shared(int head) const {
    return std::atomic_ref<float>(call_.largest_logits[head]);
  }

  const EstimateCall& call_;
  const int64_t row_bytes_;
  const int64_t values_offset_;
  const std::byte* rows_[kBatchBlocks * kBlockTokens];
  int count_ = 0;
  int next_ = 0;
  int per_fetch_ = 0;
  float largest_[kMaxGroupHeads];
};

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace gloam::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
