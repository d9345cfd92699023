// StepArrays: the input arrays of one step, packed one after another, so that one copy brings them
// to the device. Where each lies follows from the step's shape alone, so a recorded step finds them
// again. Views; the memory belongs to ModelRunner.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gloam {

// Padding included.
struct StepShape {
  int num_seqs = 0;
  int num_tokens = 0;
  int num_logit_rows = 0;
};

struct StepArrays {
  int32_t* token_ids = nullptr;     // [num_tokens], some DrawnTokens (kernels/sample.h)
  int32_t* positions = nullptr;     // [num_tokens]
  int64_t* slot_mapping = nullptr;  // [num_tokens]
  int32_t* cu_seqlens = nullptr;    // [num_seqs + 1]
  int32_t* context_lens = nullptr;  // [num_seqs]
  int32_t* logit_rows = nullptr;    // [num_logit_rows], scores first
  size_t bytes = 0;                 // of all of them

  // `base` may be null: then only `bytes` counts.
  static StepArrays At(void* base, const StepShape& shape);
};

// How many sequences a step of `num_seqs` decoding sequences is padded to where steps are recorded:
// one of a few sizes, at most `max_num_seqs`.
int PaddedDecodeSeqs(int num_seqs, int max_num_seqs);

}  // namespace gloam
