#include "kernels/cpu/sample/vocab_scan.h"

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sample/vocab_scan.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gloam::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline VF LoadClean(const float* from) {
  const DF d;
  const VF x = hn::LoadU(d, from);
  return hn::IfThenElse(hn::IsNaN(x), hn::Set(d, kMinusInfinity), hn::Min(x, hn::Set(d, FLT_MAX)));
}

int64_t ArgMaxTarget(const float* logits, int64_t vocab_size) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const int64_t lanes = hn::Lanes(d);
  // Each lane keeps the first of its largest.
  VF best = hn::Set(d, kMinusInfinity);
  auto best_at = hn::Zero(di);
  auto at = hn::Iota(di, 0);
  const auto step = hn::Set(di, static_cast<int32_t>(lanes));
  int64_t i = 0;
  for (; i + lanes <= vocab_size; i += lanes) {
    const VF x = LoadClean(logits + i);
    const auto larger = hn::Gt(x, best);
    best = hn::IfThenElse(larger, x, best);
    best_at = hn::IfThenElse(hn::RebindMask(di, larger), at, best_at);
    at = hn::Add(at, step);
  }
  HWY_ALIGN float lane_best[16];
  HWY_ALIGN int32_t lane_at[16];
  hn::Store(best, d, lane_best);
  hn::Store(best_at, di, lane_at);
  float max = kMinusInfinity;
  int64_t arg = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (lane_best[lane] > max || (lane_best[lane] == max && lane_at[lane] < arg)) {
      max = lane_best[lane];
      arg = lane_at[lane];
    }
  }
  for (; i < vocab_size; ++i) {
    if (CleanLogit(logits[i]) > max) {
      max = CleanLogit(logits[i]);
      arg = i;
    }
  }
  return arg;
}

float ChunkMaximaTarget(const float* logits, int64_t vocab_size, float* maxima) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  float max = kMinusInfinity;
  for (int64_t begin = 0; begin < vocab_size; begin += kScanChunk) {
    const int64_t end = std::min(begin + kScanChunk, vocab_size);
    VF largest = hn::Set(d, kMinusInfinity);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) largest = hn::Max(largest, LoadClean(logits + i));
    float chunk_max = hn::GetLane(hn::MaxOfLanes(d, largest));
    for (; i < end; ++i) chunk_max = std::max(chunk_max, CleanLogit(logits[i]));
    maxima[begin / kScanChunk] = chunk_max;
    max = std::max(max, chunk_max);
  }
  return max;
}

double ChunkExpSumsTarget(const float* logits, int64_t vocab_size, float max,
                          float inverse_temperature, float* sums) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  const VF reference = hn::Set(d, max);
  const VF factor = hn::Set(d, inverse_temperature);
  const auto exp_of = [&](VF x)
                          HWY_ATTR { return hn::Exp(d, hn::Mul(hn::Sub(x, reference), factor)); };
  double total = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kScanChunk) {
    const int64_t end = std::min(begin + kScanChunk, vocab_size);
    VF sum = hn::Zero(d);
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) sum = hn::Add(sum, exp_of(LoadClean(logits + i)));
    float chunk_sum = hn::GetLane(hn::SumOfLanes(d, sum));
    for (; i < end; ++i) {
      chunk_sum += hn::GetLane(exp_of(hn::Set(d, CleanLogit(logits[i]))));
    }
    sums[begin / kScanChunk] = chunk_sum;
    total += static_cast<double>(chunk_sum);
  }
  return total;
}

int64_t CountLargerTarget(const float* logits, int64_t vocab_size, float logit) {
  const DF d;
  const int64_t lanes = hn::Lanes(d);
  const VF reference = hn::Set(d, logit);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + lanes <= vocab_size; i += lanes) {
    count += static_cast<int64_t>(hn::CountTrue(d, hn::Gt(LoadClean(logits + i), reference)));
  }
  for (; i < vocab_size; ++i) count += CleanLogit(logits[i]) > logit ? 1 : 0;
  return count;
}

}  // namespace gloam::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gloam::cpu {

HWY_EXPORT(ArgMaxTarget);
HWY_EXPORT(ChunkMaximaTarget);
HWY_EXPORT(ChunkExpSumsTarget);
HWY_EXPORT(CountLargerTarget);

int64_t ArgMax(const float* logits, int64_t vocab_size) {
  return HWY_DYNAMIC_DISPATCH(ArgMaxTarget)(logits, vocab_size);
}

float ChunkMaxima(const float* logits, int64_t vocab_size, float* maxima) {
  return HWY_DYNAMIC_DISPATCH(ChunkMaximaTarget)(logits, vocab_size, maxima);
}

double ChunkExpSums(const float* logits, int64_t vocab_size, float max, float inverse_temperature,
                    float* sums) {
  return HWY_DYNAMIC_DISPATCH(ChunkExpSumsTarget)(logits, vocab_size, max, inverse_temperature,
                                                  sums);
}

int64_t CountLarger(const float* logits, int64_t vocab_size, float logit) {
  return HWY_DYNAMIC_DISPATCH(CountLargerTarget)(logits, vocab_size, logit);
}

}  // namespace gloam::cpu
#endif  // HWY_ONCE
