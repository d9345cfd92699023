// Sampling and log-probabilities. A row is handled by one thread and depends on nothing but itself.
// The vocabulary is never sorted: vectorised passes (vocab_scan.h) give a maximum for each chunk of
// it, only chunks that can hold a candidate are looked into, and cuts are found by selection.
#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/sample/vocab_scan.h"
#include "kernels/philox.h"

namespace gloam::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Candidate {
  int32_t token = 0;
  float logit = 0;
  float weight = 0;  // probability relative to the most likely token's
};

// Larger logit first, lower id among equals.
bool Before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// Buffers of one thread, kept from call to call.
struct Buffers {
  std::vector<float> raw;
  std::vector<float> maxima;
  std::vector<float> sums;
  std::vector<Candidate> candidates;
  std::vector<Candidate> selection;
  std::vector<uint64_t> seen;
};

Buffers& ThreadBuffers() {
  thread_local Buffers buffers;
  return buffers;
}

struct Row {
  float* logits;  // [vocab_size]
  int64_t vocab_size;
};

// ---- penalties and masks

bool ChangesLogits(const SampleRow& row) {
  return row.allowed != nullptr || !row.banned_tokens.empty() || !row.logit_bias.empty() ||
         row.repetition_penalty != 1.0f ||
         (!row.output_counts.empty() &&
          (row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f));
}

void CheckToken(int64_t token, int64_t vocab_size) {
  GLOAM_CHECK(token >= 0 && token < vocab_size);
}

void ApplyRepetitionPenalty(const SampleRow& row, Row x, std::vector<uint64_t>& seen) {
  seen.assign(static_cast<size_t>((x.vocab_size + 63) / 64), 0);
  const auto penalise_once = [&](int32_t token) {
    CheckToken(token, x.vocab_size);
    const uint64_t bit = uint64_t{1} << (token % 64);
    if ((seen[token / 64] & bit) != 0) return;
    seen[token / 64] |= bit;
    float& logit = x.logits[token];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  };
  for (const int32_t token : row.prompt_tokens) penalise_once(token);
  for (const auto& [token, count] : row.output_counts) penalise_once(token);
}

void ApplyRowChanges(const SampleRow& row, Row x, std::vector<uint64_t>& seen) {
  if (row.allowed != nullptr) {
    for (int64_t token = 0; token < x.vocab_size; ++token) {
      if ((row.allowed[token / 32] >> (token % 32) & 1) == 0) x.logits[token] = kMinusInfinity;
    }
  }
  for (const int32_t token : row.banned_tokens) {
    CheckToken(token, x.vocab_size);
    x.logits[token] = kMinusInfinity;
  }
  for (const auto& [token, bias] : row.logit_bias) {
    CheckToken(token, x.vocab_size);
    x.logits[token] += bias;
  }
  if (row.repetition_penalty != 1.0f) ApplyRepetitionPenalty(row, x, seen);
  for (const auto& [token, count] : row.output_counts) {
    CheckToken(token, x.vocab_size);
    if (count <= 0) continue;
    x.logits[token] -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
  }
}

// ---- candidates

// Finds every token whose logit is at least `threshold`, in ascending order of ids.
void GatherAtLeast(Row x, float threshold, const std::vector<float>& maxima,
                   std::vector<Candidate>& candidates) {
  candidates.clear();
  for (int64_t begin = 0; begin < x.vocab_size; begin += kScanChunk) {
    if (maxima[begin / kScanChunk] < threshold) continue;
    const int64_t end = std::min(begin + kScanChunk, x.vocab_size);
    for (int64_t token = begin; token < end; ++token) {
      const float logit = CleanLogit(x.logits[token]);
      if (logit >= threshold) candidates.push_back({static_cast<int32_t>(token), logit, 0});
    }
  }
}

// Removes the candidates that come after `last`; the others keep their order.
void DropAfter(const Candidate& last, std::vector<Candidate>& candidates) {
  std::erase_if(candidates, [&](const Candidate& c) { return Before(last, c); });
}

// The `count` first tokens in the order of Before, written in ascending order of ids. Needs the
// row's chunk maxima.
void GatherTop(Row x, int64_t count, Buffers& buffers) {
  // At least `count` tokens reach the count-th largest chunk maximum.
  float threshold = kMinusInfinity;
  const int64_t num_chunks = NumScanChunks(x.vocab_size);
  if (count <= num_chunks) {
    buffers.sums.assign(buffers.maxima.begin(), buffers.maxima.begin() + num_chunks);
    const auto nth = buffers.sums.begin() + (count - 1);
    std::nth_element(buffers.sums.begin(), nth, buffers.sums.end(), std::greater<float>());
    threshold = *nth;
  }
  GatherAtLeast(x, threshold, buffers.maxima, buffers.candidates);
  if (static_cast<int64_t>(buffers.candidates.size()) <= count) return;
  buffers.selection = buffers.candidates;
  const auto nth = buffers.selection.begin() + (count - 1);
  std::nth_element(buffers.selection.begin(), nth, buffers.selection.end(), Before);
  DropAfter(*nth, buffers.candidates);
}

// Keeps the smallest set of most likely candidates whose weights reach `mass`, at least one.
// Halves are selected and weighed, never sorted: linear time.
void KeepTopMass(double mass, Buffers& buffers) {
  std::vector<Candidate>& pool = buffers.selection;
  pool = buffers.candidates;
  auto begin = pool.begin();
  auto end = pool.end();
  // The cut is in [begin, end); what comes before `begin` weighs less than `mass` in all.
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle - 1, end, Before);
    double half = 0;
    for (auto it = begin; it != middle; ++it) half += double{it->weight};
    if (half >= mass) {
      end = middle;
    } else {
      mass -= half;
      begin = middle;
    }
  }
  DropAfter(*begin, buffers.candidates);
}

// ---- the draw

// Inverse of the cumulative distribution over the candidates in ascending order of ids.
int32_t DrawCandidate(const std::vector<Candidate>& candidates, double uniform) {
  double total = 0;
  for (const Candidate& c : candidates) total += double{c.weight};
  double left = uniform * total;
  int32_t token = candidates.front().token;
  for (const Candidate& c : candidates) {
    if (c.weight == 0) continue;
    token = c.token;
    left -= double{c.weight};
    if (left < 0) break;
  }
  return token;
}

// Draws from the whole vocabulary: by chunk, then inside it.
int32_t DrawFromAll(Row x, float max, float inverse_temperature, double uniform, Buffers& buffers) {
  const int64_t num_chunks = NumScanChunks(x.vocab_size);
  const double total =
      ChunkExpSums(x.logits, x.vocab_size, max, inverse_temperature, buffers.sums.data());
  double left = uniform * total;
  int64_t chunk = 0;
  for (int64_t i = 0; i < num_chunks; ++i) {
    if (buffers.sums[i] == 0) continue;
    chunk = i;
    if (left < double{buffers.sums[i]}) break;
    left -= double{buffers.sums[i]};
  }
  const int64_t begin = chunk * kScanChunk;
  const int64_t end = std::min(begin + kScanChunk, x.vocab_size);
  buffers.candidates.clear();
  for (int64_t token = begin; token < end; ++token) {
    const float logit = CleanLogit(x.logits[token]);
    const float weight = std::exp((logit - max) * inverse_temperature);
    if (logit == kMinusInfinity) continue;
    buffers.candidates.push_back({static_cast<int32_t>(token), logit, weight});
  }
  return DrawCandidate(buffers.candidates, left / double{buffers.sums[chunk]});
}

// Sets the candidates' weights and returns their sum.
double Weigh(float max, float inverse_temperature, std::vector<Candidate>& candidates) {
  double total = 0;
  for (Candidate& c : candidates) {
    c.weight = std::exp((c.logit - max) * inverse_temperature);
    total += double{c.weight};
  }
  return total;
}

int32_t Draw(const SampleRow& row, Row x, Buffers& buffers) {
  buffers.maxima.resize(static_cast<size_t>(NumScanChunks(x.vocab_size)));
  buffers.sums.resize(buffers.maxima.size());
  const float max = ChunkMaxima(x.logits, x.vocab_size, buffers.maxima.data());
  if (max == kMinusInfinity) return 0;  // nothing is allowed
  const float inverse_temperature =
      std::min(1.0f / row.temperature, std::numeric_limits<float>::max());
  const double uniform = UniformDraw(row.seed, row.draw_index);
  const bool by_count = row.top_k > 0 && row.top_k < x.vocab_size;
  const bool by_mass = row.top_p < 1.0f;
  if (!by_count && !by_mass && row.min_p <= 0) {
    return DrawFromAll(x, max, inverse_temperature, uniform, buffers);
  }

  std::vector<Candidate>& candidates = buffers.candidates;
  const auto gather_within = [&](double distance) {  // of the maximum, in units of the temperature
    const double threshold = double{max} - distance / double{inverse_temperature};
    GatherAtLeast(x, std::min(static_cast<float>(threshold), max), buffers.maxima, candidates);
    return Weigh(max, inverse_temperature, candidates);
  };
  if (by_count) {
    GatherTop(x, row.top_k, buffers);
    const double total = Weigh(max, inverse_temperature, candidates);
    if (by_mass) KeepTopMass(double{row.top_p} * total, buffers);
  } else if (by_mass) {
    const double total =
        ChunkExpSums(x.logits, x.vocab_size, max, inverse_temperature, buffers.sums.data());
    const double mass = double{row.top_p} * total;
    // Tokens farther from the maximum than this, all together, cannot reach the mass that top_p
    // leaves out. The set mostly ends much closer to it.
    const double left_out = (1.0 - double{row.top_p}) * total / static_cast<double>(x.vocab_size);
    const double farthest = 0.01 - std::log(left_out);
    double distance = 2;
    while (gather_within(std::min(distance, farthest)) < mass && distance < farthest) {
      distance *= 1.5;
    }
    KeepTopMass(mass, buffers);
  } else {
    // A little farther than min_p says: the weights decide.
    gather_within(0.01 - std::log(double{row.min_p}));
  }
  if (row.min_p > 0) {
    const float min_weight = std::min(row.min_p, 1.0f);
    std::erase_if(candidates, [&](const Candidate& c) { return c.weight < min_weight; });
  }
  return DrawCandidate(candidates, uniform);
}

// ---- log-probabilities

// Fills result.logprob for result.token and result.top from the model's own logits.
void AddLogprobs(Row x, int num_logprobs, Buffers& buffers, SampleResult& result) {
  buffers.maxima.resize(static_cast<size_t>(NumScanChunks(x.vocab_size)));
  buffers.sums.resize(buffers.maxima.size());
  const float max = ChunkMaxima(x.logits, x.vocab_size, buffers.maxima.data());
  const double log_sum =
      std::log(ChunkExpSums(x.logits, x.vocab_size, max, 1.0f, buffers.sums.data()));
  const auto logprob_of = [&](float logit) {
    if (logit == kMinusInfinity) return kMinusInfinity;
    return static_cast<float>(double{logit} - double{max} - log_sum);
  };
  const float logit = CleanLogit(x.logits[result.token]);
  result.logprob.token = result.token;
  result.logprob.logprob = logprob_of(logit);
  result.logprob.rank = static_cast<int>(1 + CountLarger(x.logits, x.vocab_size, logit));
  result.top.clear();
  const int64_t count = std::min<int64_t>(num_logprobs, x.vocab_size);
  if (count == 0) return;
  GatherTop(x, count, buffers);
  std::sort(buffers.candidates.begin(), buffers.candidates.end(), Before);
  int rank = 0;
  for (size_t i = 0; i < buffers.candidates.size(); ++i) {
    const Candidate& c = buffers.candidates[i];
    if (i == 0 || c.logit != buffers.candidates[i - 1].logit) rank = static_cast<int>(i) + 1;
    result.top.push_back({c.token, logprob_of(c.logit), rank});
  }
}

void SampleOne(const SampleRow& row, Row x, SampleResult& result) {
  Buffers& buffers = ThreadBuffers();
  Row model = x;
  const bool changes = ChangesLogits(row);
  if (changes && row.num_logprobs >= 0) {
    buffers.raw.assign(x.logits, x.logits + x.vocab_size);
    model.logits = buffers.raw.data();
  }
  if (changes) ApplyRowChanges(row, x, buffers.seen);
  result.token = row.temperature > 0 ? Draw(row, x, buffers)
                                     : static_cast<int32_t>(ArgMax(x.logits, x.vocab_size));
  if (row.num_logprobs >= 0) {
    AddLogprobs(model, row.num_logprobs, buffers, result);
  } else {
    result.logprob = {};
    result.top.clear();
  }
}

Row RowOf(const TensorView& logits, int64_t row) {
  return {static_cast<float*>(logits.data) + row * logits.strides[0], logits.shape[1]};
}

void CheckLogits(const TensorView& logits, size_t num_rows, size_t num_results) {
  GLOAM_CHECK(logits.rank == 2 && logits.dtype == DType::kF32 && logits.shape[1] > 0);
  GLOAM_CHECK(logits.shape[0] == static_cast<int64_t>(num_rows) && num_results == num_rows);
}

// Of greedy rows that have candidates: the largest, the lowest id among equals.
void SampleCandidates(const SampleParams& params) {
  const TensorView& logits = params.logits.values;
  const int32_t* tokens = params.logits.tokens;
  for (int64_t row = 0; row < logits.shape[0]; ++row, tokens += logits.shape[1]) {
    GLOAM_CHECK(params.rows[row].is_greedy());
    const float* values = RowOf(logits, row).logits;
    Candidate best = {tokens[0], CleanLogit(values[0])};
    for (int64_t i = 1; i < logits.shape[1]; ++i) {
      const Candidate candidate = {tokens[i], CleanLogit(values[i])};
      if (Before(candidate, best)) best = candidate;
    }
    params.results[row] = {.token = best.token};
  }
}

}  // namespace

void Sample(const SampleParams& params, ThreadPool& pool) {
  const TensorView& logits = params.logits.values;
  CheckLogits(logits, params.rows.size(), params.results.size());
  if (params.logits.tokens != nullptr) return SampleCandidates(params);
  pool.ParallelFor(logits.shape[0], [&](int64_t row, int) {
    SampleOne(params.rows[row], RowOf(logits, row), params.results[row]);
  });
}

void Score(const ScoreParams& params, ThreadPool& pool) {
  CheckLogits(params.logits, params.tokens.size(), params.results.size());
  pool.ParallelFor(params.logits.shape[0], [&](int64_t row, int) {
    SampleResult& result = params.results[row];
    result.token = params.tokens[row];
    CheckToken(result.token, params.logits.shape[1]);
    AddLogprobs(RowOf(params.logits, row), params.num_logprobs, ThreadBuffers(), result);
  });
}

}  // namespace gloam::cpu
