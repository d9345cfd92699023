// The seam between sampling's host part (sample.cc) and its kernels (sample_scan.cu and
// sample_draw.cu): what the host packs for each row, what the kernels leave, and the launches.
//
// Probabilities are fixed-point integers relative to the row's most likely token (weights, in units
// of 2^-44), so that sums do not depend on the order of additions: a row's result is the same
// however many thread blocks share its vocabulary.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gloam::cuda {

// Vocabulary entries that share one maximum and one mass: what a warp loads with 16 bytes per lane.
// A chunk's mass is first taken relative to its own maximum, so that one pass gives both.
inline constexpr int kSampleChunk = 128;
inline constexpr double kWeightUnit = 0x1p-44;

// A row of a call. Lists are ranges of SampleArgs::list_tokens: banned, bias, prompt and counts,
// one after another from first_entry.
struct SampleTask {
  double uniform;             // the draw, in [0, 1)
  float inverse_temperature;  // finite; unused for greedy rows
  float top_p;
  float min_p;
  int32_t top_k;  // 0: all
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  int32_t num_logprobs;  // -1: none; at most vocab_size
  int32_t num_banned;
  int32_t num_bias;    // sorted by token
  int32_t num_prompt;  // 0 without a repetition penalty
  int32_t num_counts;  // distinct tokens
  int64_t first_entry;
  int64_t first_value;  // in list_values: num_bias floats, then num_counts occurrences
  int64_t first_top;    // in SampleArgs::top
  int64_t mask;         // first word in SampleArgs::masks; -1: all are allowed
  bool greedy;
  bool draws_from_total;  // needs the mass of the whole vocabulary
  bool changed;           // has a mask or lists: what it draws from is not what the model gave
};

struct SampleTop {
  int32_t token;
  float logit;
};

// What a row gives back.
struct SampleOutcome {
  int32_t token;
  float logit;        // of the token, as the model gave it; this and below with num_logprobs >= 0
  float max;          // the largest
  int32_t rank;       // 1 + number of larger logits
  uint64_t exp_mass;  // sum of exp(logit - max), in units of kWeightUnit
};

struct SampleArgs {
  float* logits;              // [num_rows, vocab_size], device
  int64_t row_stride;         // in elements
  const int32_t* candidates;  // tokens of the logits, of greedy rows alone; null: their indices
  int32_t vocab_size;         // or candidates
  int32_t num_rows;
  int32_t num_chunks;          // ceil(vocab_size / kSampleChunk)
  bool by_four;                // rows are aligned to 16 bytes
  const SampleTask* tasks;     // [num_rows], device
  const int32_t* list_tokens;  // device
  const uint32_t* list_values;
  const uint32_t* masks;
  float* saved;             // as long as list_tokens: the model's logits of those tokens
  uint32_t* chunk_max;      // [num_rows, num_chunks] KeyOf the largest logit
  uint64_t* chunk_mass;     // [num_rows, num_chunks] at the row's temperature
  uint64_t* model_mass;     // [num_rows, num_chunks] at temperature 1, for log-probabilities
  uint64_t* best;           // [num_rows] zero between calls
  uint32_t* num_done;       // [num_rows] zero between calls
  int32_t* tokens;          // [num_rows] the drawn (or given) tokens, device
  SampleOutcome* outcomes;  // [num_rows], pinned
  SampleTop* top;           // pinned
};

// What a pass over the logits is for: the draw, with the model's masses of rows that are not
// changed; or log-probabilities of changed rows that want them, after the draw.
enum class SamplePass : uint8_t { kDraw, kLogprobs };

// Fills tokens and outcomes[].token with the largest logits, of candidates too; needs no tasks.
void LaunchGreedy(const SampleArgs& args, int num_sms, cudaStream_t stream);

// Applies banned tokens, bias and penalties to the logits.
void LaunchPenalties(const SampleArgs& args, bool any_repetition, cudaStream_t stream);
// Fills chunk_max, chunk_mass and model_mass as far as the rows need them.
void LaunchScan(const SampleArgs& args, SamplePass pass, int num_sms, cudaStream_t stream);
// Fills tokens and outcomes[].token, and gives rows with log-probabilities their own logits back.
void LaunchDraw(const SampleArgs& args, cudaStream_t stream);
// Fills the rest of outcomes, and top in any order.
void LaunchLogprobs(const SampleArgs& args, cudaStream_t stream);

}  // namespace gloam::cuda
