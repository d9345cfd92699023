// What sampling should draw, in double precision: each token's interval of the draw after all cuts,
// and how far a token may be from it.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/ops.h"
#include "kernels/philox.h"

namespace gloam::cuda {

// Errors relative to the whole mass. The GPU's weights are within 2 ulp and their sums exact; the
// CPU sums 64 weights in fp32.
inline constexpr double kGpuError = 4e-7;
inline constexpr double kCpuError = 6e-6;

inline float Clean(float x) { return std::isnan(x) ? -INFINITY : std::min(x, FLT_MAX); }

// The row's logits after mask, bans, bias and penalties, as sample.h states them.
inline std::vector<float> Changed(const float* logits, int64_t vocab_size, const SampleRow& row) {
  std::vector<float> x(logits, logits + vocab_size);
  for (int64_t i = 0; i < vocab_size; ++i) {
    if (row.allowed != nullptr && (row.allowed[i / 32] >> (i % 32) & 1) == 0) x[i] = -INFINITY;
  }
  for (const int32_t token : row.banned_tokens) x[token] = -INFINITY;
  for (const auto& [token, bias] : row.logit_bias) x[token] += bias;
  if (row.repetition_penalty != 1.0f) {
    std::vector<bool> seen(vocab_size, false);
    const auto penalise = [&](int32_t token) {
      if (seen[token]) return;
      seen[token] = true;
      x[token] =
          x[token] > 0 ? x[token] / row.repetition_penalty : x[token] * row.repetition_penalty;
    };
    for (const int32_t token : row.prompt_tokens) penalise(token);
    for (const auto& [token, count] : row.output_counts) penalise(token);
  }
  for (const auto& [token, count] : row.output_counts) {
    const float frequency = row.frequency_penalty * static_cast<float>(count);
    const float penalty = frequency + row.presence_penalty;
    if (count > 0) x[token] -= penalty;
  }
  for (float& logit : x) logit = Clean(logit);
  return x;
}

// What double precision says of a drawn token.
struct Verdict {
  double distance = 0;     // of the draw from the token's interval, relative to the mass; 0: inside
  double to_edge = 0;      // of the draw from the nearest edge of its own token's interval
  bool clear_cuts = true;  // no cut within kCpuError of another
  int32_t token = 0;       // where the draw falls
};

class Reference {
 public:
  Reference(const std::vector<float>& logits, const SampleRow& row) {
    const size_t n = logits.size();
    const float max = *std::max_element(logits.begin(), logits.end());
    if (max == -INFINITY) return;
    const float inverse = std::min(1.0f / row.temperature, FLT_MAX);
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    std::vector<double> weights(n);
    for (size_t i = 0; i < n; ++i) {
      weights[i] = logits[i] == -INFINITY ? 0 : std::exp(double{(logits[i] - max) * inverse});
    }
    size_t kept = row.top_k > 0 ? std::min<size_t>(row.top_k, n) : n;
    double total = 0;
    for (size_t i = 0; i < kept; ++i) total += weights[order[i]];
    if (row.top_p < 1.0f) {
      const double need = double{row.top_p} * total;
      double mass = 0;
      size_t fewest = 0, most = 0;  // as the error may make it
      for (size_t i = 0; i < kept && most == 0; ++i) {
        mass += weights[order[i]];
        if (fewest == 0 && mass >= need - kCpuError * total) fewest = i + 1;
        if (mass >= need + kCpuError * total || i + 1 == kept) most = i + 1;
      }
      clear_cuts_ = fewest == most;
      // The mass whose membership is open within the GPU's own error.
      mass = 0;
      size_t least = 0, last = 0;
      for (size_t i = 0; i < kept && last == 0; ++i) {
        mass += weights[order[i]];
        if (least == 0 && mass >= need - kGpuError * total) least = i + 1;
        if (mass >= need + kGpuError * total || i + 1 == kept) last = i + 1;
      }
      for (size_t i = least; i < last; ++i) open_ += weights[order[i]];
      kept = last;
    }
    const double min_weight = row.min_p > 0 ? std::min(double{row.min_p}, 1.0) : 0;
    std::vector<std::pair<int, double>> tokens;
    for (size_t i = 0; i < kept; ++i) {
      const double w = weights[order[i]];
      if (std::abs(w - min_weight) < 1e-6 * min_weight && w < 1) {
        clear_cuts_ = false;
        open_ += w;
      }
      if (w >= min_weight * (1 - 5e-7)) tokens.emplace_back(order[i], w);
    }
    std::sort(tokens.begin(), tokens.end());
    for (const auto& [token, weight] : tokens) {
      if (weight == 0) continue;
      intervals_.push_back({token, total_, total_ + weight});
      total_ += weight;
    }
    uniform_ = cpu::UniformDraw(row.seed, row.draw_index);
  }

  Verdict Judge(int32_t token) const {
    Verdict verdict;
    verdict.clear_cuts = clear_cuts_;
    if (intervals_.empty()) {
      verdict.distance = token == 0 ? 0 : 1;
      verdict.to_edge = 1;
      return verdict;
    }
    const double at = uniform_ * total_;
    verdict.distance = 1;
    for (const Interval& interval : intervals_) {
      if (interval.token == token) {
        verdict.distance =
            std::max({0.0, interval.begin - at - open_, at - interval.end - open_}) / total_;
      }
      if (interval.begin <= at && at < interval.end) {
        verdict.token = interval.token;
        // The ends of all are no edges.
        const double low = interval.begin == 0 ? 1 : (at - interval.begin) / total_;
        const double high = interval.end == total_ ? 1 : (interval.end - at) / total_;
        verdict.to_edge = std::min(low, high);
      }
    }
    return verdict;
  }

 private:
  struct Interval {
    int32_t token;
    double begin, end;
  };
  std::vector<Interval> intervals_;
  double total_ = 0;
  double open_ = 0;
  double uniform_ = 0;
  bool clear_cuts_ = true;
};

}  // namespace gloam::cuda
