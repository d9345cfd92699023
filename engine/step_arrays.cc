#include "engine/step_arrays.h"

#include <algorithm>

namespace gloam {
namespace {

constexpr size_t kAlignment = 64;  // a cache line

// Takes room for `count` elements.
template <typename T>
void Place(void* base, int count, size_t* at, T** array) {
  *array = base == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<std::byte*>(base) + *at);
  *at += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
}

int RoundUp(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

StepArrays StepArrays::At(void* base, const StepShape& shape) {
  StepArrays arrays;
  Place(base, shape.num_tokens, &arrays.bytes, &arrays.token_ids);
  Place(base, shape.num_tokens, &arrays.bytes, &arrays.positions);
  Place(base, shape.num_tokens, &arrays.bytes, &arrays.slot_mapping);
  Place(base, shape.num_seqs + 1, &arrays.bytes, &arrays.cu_seqlens);
  Place(base, shape.num_seqs, &arrays.bytes, &arrays.context_lens);
  Place(base, shape.num_logit_rows, &arrays.bytes, &arrays.logit_rows);
  return arrays;
}

int PaddedDecodeSeqs(int num_seqs, int max_num_seqs) {
  const int padded = num_seqs <= 2     ? num_seqs
                     : num_seqs <= 4   ? 4
                     : num_seqs <= 64  ? RoundUp(num_seqs, 8)
                     : num_seqs <= 128 ? RoundUp(num_seqs, 16)
                                       : RoundUp(num_seqs, 32);
  return std::min(padded, max_num_seqs);
}

}  // namespace gloam
