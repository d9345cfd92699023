#include "kernels/prune.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/sparse/token_scan.h"
#include "kernels/cpu/sparse/top_k.h"

namespace gloam::cpu {
namespace {

// As token_scan.h counts them.
float Finite(float logit) {
  return std::isnan(logit) ? -FLT_MAX : std::clamp(logit, -FLT_MAX, FLT_MAX);
}

TokenMask AlwaysKept(const PruneParams& params, int64_t block) {
  return params.always_kept == nullptr ? kNoTokens : params.always_kept[block];
}

void CheckParams(const PruneParams& params) {
  GLOAM_CHECK(params.pruner.type != PrunerType::kTopP || params.pruner.threshold > 0);
  uint32_t no_candidates = 0;
  for (int64_t i = 0; i < params.num_blocks; ++i) {
    no_candidates |= AlwaysKept(params, i) & ~uint32_t{params.candidates[i]};
  }
  GLOAM_CHECK(no_candidates == 0);
}

// kept := the candidates that top-p and keep_weight add to those that are kept in any case; returns
// their mass. `base` is the mass of the latter, beside the `total` of everything.
double AddTopP(const PruneParams& params, double base, double total) {
  thread_local std::vector<TokenMask> choices;
  choices.resize(static_cast<size_t>(params.num_blocks));
  for (int64_t i = 0; i < params.num_blocks; ++i) {
    choices[i] = params.candidates[i] & static_cast<TokenMask>(~AlwaysKept(params, i));
  }
  const auto keep = [&](float at_least) {
    return KeepWeights(params.weights, at_least, choices.data(), params.num_blocks, params.kept);
  };
  float at_least = params.pruner.keep_weight > 0
                       ? static_cast<float>(params.pruner.keep_weight * total)
                       : std::numeric_limits<float>::infinity();
  const double mass = keep(at_least);
  // For most heads keep_weight is enough. Else what is missing is below what is kept so far.
  const double share = params.pruner.threshold;
  const double missing = share * total - base - mass;
  if (missing <= 0) return mass;
  for (int64_t i = 0; i < params.num_blocks; ++i) {
    params.kept[i] = choices[i] & static_cast<TokenMask>(~params.kept[i]);
  }
  // What is below this sums to less than may be lost; half of it leaves room for rounding.
  const int64_t most = params.num_blocks * kBlockTokens;
  const float negligible =
      static_cast<float>(0.5 * (1 - share) * total / static_cast<double>(most));
  KeyBuffers& buffers = ThreadKeyBuffers(most);
  const KeyRange keys = GatherWeights(params.weights, std::max(negligible, FLT_MIN), params.kept,
                                      params.num_blocks, buffers);
  // Without any, everything is kept and rounding alone has left something missing.
  if (keys.count > 0) at_least = ValueOfKey(CutByMass(buffers, keys, missing).key);
  return keep(at_least);
}

// Adds the largest weights until min_tokens are kept. Returns whether any were missing.
bool FillUp(const PruneParams& params) {
  if (params.pruner.min_tokens == 0) return false;
  const int64_t missing = params.pruner.min_tokens - CountOf(params.kept, params.num_blocks);
  if (missing <= 0) return false;
  thread_local std::vector<TokenMask> rest;
  rest.resize(static_cast<size_t>(params.num_blocks));
  for (int64_t i = 0; i < params.num_blocks; ++i) {
    rest[i] = params.candidates[i] & static_cast<TokenMask>(~params.kept[i]);
  }
  KeepTopTokens(params.weights, missing, params.num_blocks, rest.data());
  for (int64_t i = 0; i < params.num_blocks; ++i) params.kept[i] |= rest[i];
  return true;
}

}  // namespace

PruneResult Prune(const PruneParams& params) {
  CheckParams(params);
  const int64_t num_blocks = params.num_blocks;
  PruneResult result;
  float max = MaxOf(params.logits, params.candidates, num_blocks);
  for (int i = 0; i < params.num_open; ++i) max = std::max(max, Finite(params.open_logits[i]));
  double open_mass = 0;
  for (int i = 0; i < params.num_open; ++i) {
    open_mass += std::exp(static_cast<double>(Finite(params.open_logits[i])) - max);
  }
  result.max_logit = max;
  result.total_mass =
      ExpWeights(params.logits, params.candidates, num_blocks, max, params.weights) + open_mass;

  bool knows_kept_mass = false;
  switch (params.pruner.type) {
    case PrunerType::kTopP:
      if (params.pruner.threshold < 1) {
        const double always = params.always_kept == nullptr
                                  ? 0
                                  : SumOf(params.weights, params.always_kept, num_blocks);
        const double base = open_mass + always;
        result.kept_mass = base + AddTopP(params, base, result.total_mass);
        knows_kept_mass = true;
        break;
      }
      [[fallthrough]];
    case PrunerType::kNone:
      std::copy_n(params.candidates, num_blocks, params.kept);
      break;
    case PrunerType::kThreshold:
      std::copy_n(params.candidates, num_blocks, params.kept);
      KeepAtLeast(params.logits, max - params.pruner.threshold, num_blocks, params.kept);
      break;
  }
  if (params.always_kept != nullptr) {
    for (int64_t i = 0; i < num_blocks; ++i) params.kept[i] |= AlwaysKept(params, i);
  }
  if (FillUp(params) || !knows_kept_mass) {
    result.kept_mass = SumOf(params.weights, params.kept, num_blocks) + open_mass;
  }
  result.num_kept = CountOf(params.kept, num_blocks);
  return result;
}

}  // namespace gloam::cpu
