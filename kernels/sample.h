// From logits to tokens: penalties, bias, temperature, top-k / top-p / min-p, the draw, and
// log-probabilities. One row per sequence that samples in this step.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kernels/tensor_view.h"

namespace gloam {

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
  int rank = 0;  // 1 is the most likely token of the vocabulary; 0 where not computed
};

// Logits of rows that sample.
struct LogitRows {
  TensorView values;  // [num_rows, num_columns] fp32
  // Null: a column is the token of its index. Otherwise rows have candidates instead of all their
  // logits, the first of the largest among them: [num_rows, num_columns] tokens, on the device.
  const int32_t* tokens = nullptr;

  LogitRows Rows(int64_t begin, int64_t count) const {
    return {values.Rows(begin, count),
            tokens == nullptr ? nullptr : tokens + begin * values.shape[1]};
  }
};

// What one row asks for. Order of application: allowed mask, logit_bias, repetition, frequency and
// presence penalties, temperature, top_k, top_p, min_p, draw. temperature 0 is greedy: the largest
// logit, lowest token id first among equals.
struct SampleRow {
  float temperature = 1.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int top_k = 0;  // 0: all
  float repetition_penalty = 1.0f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  std::span<const int32_t> prompt_tokens;  // for repetition_penalty; empty unless it is not 1
  std::span<const std::pair<int32_t, int32_t>> output_counts;  // (token, occurrences) generated
  std::span<const std::pair<int32_t, float>> logit_bias;
  std::span<const int32_t> banned_tokens;  // never drawn (end-of-sequence before min_tokens)
  const uint32_t* allowed = nullptr;       // bit mask over the vocabulary, or null: all allowed
  uint64_t seed = 0;                       // with `draw_index`, determines the draw completely
  uint64_t draw_index = 0;
  int num_logprobs = -1;  // -1: none; 0: of the drawn token; n: and of the n most likely tokens

  // Whether what has been generated counts.
  bool is_penalised() const {
    return repetition_penalty != 1.0f || frequency_penalty != 0.0f || presence_penalty != 0.0f;
  }
  // Whether the largest logit is all that it asks for.
  bool is_greedy() const {
    return !(temperature > 0) && num_logprobs < 0 && allowed == nullptr && banned_tokens.empty() &&
           logit_bias.empty() && !is_penalised();
  }
};

struct SampleResult {
  int32_t token = 0;
  TokenLogprob logprob;           // of the drawn token, when num_logprobs >= 0
  std::vector<TokenLogprob> top;  // num_logprobs entries, most likely first
};

// Log-probabilities are those of the model: log_softmax of the logits as they came, before
// penalties and temperature.
struct SampleParams {
  // Used as scratch, contents undefined afterwards. Candidates alone only where all rows are
  // greedy.
  LogitRows logits;
  std::span<const SampleRow> rows;  // [num_rows], read by the call
  std::span<SampleResult> results;  // [num_rows], complete after Ops::FinishSample
};

// Among a step's token ids: the token that row `row` of the last Sample drew, for a host that does
// not know it yet.
constexpr int32_t DrawnToken(int row) { return -1 - row; }

// Puts the tokens themselves where DrawnTokens stand.
struct DrawnTokensParams {
  int32_t* token_ids = nullptr;  // [num_tokens], device
  int num_tokens = 0;
};

// Log-probabilities of given tokens (prompt_logprobs, echo, scoring).
struct ScoreParams {
  TensorView logits;                // [num_rows, vocab_size] fp32
  std::span<const int32_t> tokens;  // [num_rows] the token that followed
  int num_logprobs = 0;             // as in SampleRow, >= 0
  std::span<SampleResult> results;  // [num_rows]; token = tokens[i]
};

}  // namespace gloam
