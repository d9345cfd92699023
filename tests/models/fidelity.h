// How far a model's log-probabilities are from the reference's, at every position of the golden
// files that tests/goldens/make_logit_goldens.py writes, or of another backend's run. Used by
// fidelity_test, cuda_fidelity_test and bench/fidelity.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "models/model.h"

namespace gloam {

// What the reference says at one position of a prompt.
struct GoldenRow {
  int position = 0;
  double logprob = 0;     // of the token that follows
  int32_t top_token = 0;  // the most likely token
  double margin = 0;      // its log-probability less that of the second
};

struct GoldenPrompt {
  std::string name;
  int prompt_tokens = 0;  // the rest of token_ids is the reference's greedy continuation
  std::vector<int32_t> token_ids;
  std::vector<GoldenRow> rows;  // by position
};

// Errors: kNotFound, kInvalidArgument with the file and what is wrong.
[[nodiscard]] StatusOr<std::vector<GoldenPrompt>> ReadLogitGoldens(
    const std::filesystem::path& path);

// What `model` itself says: every position of `texts`, each of which goes on with `num_generated`
// greedy tokens. A reference for another backend or another arithmetic.
std::vector<GoldenPrompt> MakeReference(Model& model, Ops& ops, DType kv_dtype,
                                        const std::vector<std::vector<int32_t>>& texts,
                                        int num_generated);

// Differences at a set of positions.
struct FidelityStats {
  int num_rows = 0;           // inside the prompts: their next token is text, not the model's own
  double sum_difference = 0;  // of |ours - reference's| log-probability of the next token
  double sum_signed = 0;      // of reference's - ours: the rise of the negative log-likelihood
  double max_difference = 0;
  int num_clear = 0;           // rows, continuation included, whose margin exceeds the noise
  int num_disagree = 0;        // of those, rows whose most likely token is another
  double max_margin_lost = 0;  // largest reference margin at which the most likely token differed

  void Add(const FidelityStats& other);
  double mean_difference() const { return num_rows > 0 ? sum_difference / num_rows : 0; }
  double nll_difference() const { return num_rows > 0 ? sum_signed / num_rows : 0; }
};

// Runs `prompts` through `model`, several to a step, teacher-forced. One result per prompt.
// `noise`: the reference's margins up to it are not held against the model.
std::vector<FidelityStats> MeasureFidelity(Model& model, Ops& ops, DType kv_dtype,
                                           const std::vector<GoldenPrompt>& prompts, double noise);

}  // namespace gloam
