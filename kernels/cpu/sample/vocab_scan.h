// Vectorised passes over one row of logits. NaN counts as -infinity and +infinity as the largest
// finite number, here and in sample.cc (CleanLogit). Any thread.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace gloam::cpu {

// Vocabulary entries that share one maximum and one sum; the last chunk may be shorter.
inline constexpr int64_t kScanChunk = 64;

inline int64_t NumScanChunks(int64_t vocab_size) {
  return (vocab_size + kScanChunk - 1) / kScanChunk;
}

inline float CleanLogit(float logit) {
  return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : std::min(logit, FLT_MAX);
}

// Index of the largest logit, the lowest among equals; 0 when all are -infinity.
int64_t ArgMax(const float* logits, int64_t vocab_size);

// Writes the maximum of each chunk and returns the largest of them.
float ChunkMaxima(const float* logits, int64_t vocab_size, float* maxima);

// Writes the sum of exp((logit - max) * inverse_temperature) over each chunk and returns the total.
// Chunks are summed in fp32, the total in double.
double ChunkExpSums(const float* logits, int64_t vocab_size, float max, float inverse_temperature,
                    float* sums);

// Number of logits strictly larger than `logit`.
int64_t CountLarger(const float* logits, int64_t vocab_size, float logit);

}  // namespace gloam::cpu
