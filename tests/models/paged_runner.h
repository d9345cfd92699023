// PagedRunner: drives a Model without the engine, for tests and benches: a KV cache of its own,
// whose blocks it hands out in a random order, and steps that mix any chunks of any sequences.
// One thread.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "models/model.h"

namespace gloam {

// Makes room in the model and its backend for steps of at most `max_tokens` tokens, each of any
// sequence. Errors: kResourceExhausted.
[[nodiscard]] Status ReserveSteps(Model& model, Ops& ops, DType kv_dtype, int max_tokens,
                                  int max_logit_rows);

class PagedRunner {
 public:
  struct Chunk {
    int sequence = 0;                 // from AddSequence
    std::span<const int32_t> tokens;  // appended to the sequence by the step
    std::vector<int> logit_rows;      // indices into `tokens`
  };

  // `model` must be reserved for the steps to come (ReserveSteps), and use `ops`.
  PagedRunner(Model& model, Ops& ops, DType kv_dtype, int num_blocks, uint64_t seed);

  int AddSequence();
  int Length(int sequence) const { return sequences_[sequence].length; }

  // A new sequence with the same tokens, their keys and values copied to blocks of its own.
  int Copy(int sequence);

  // Gives every block back. The ids of sequences start at 0 again.
  void Clear();

  // One step. The logits of all chunks' rows, in their order, on the backend's device; valid until
  // the next step.
  TensorView Step(std::span<const Chunk> chunks);

  // The same for a single chunk.
  TensorView Step(const Chunk& chunk) { return Step({&chunk, 1}); }

  // The same with the logits where the host reads them.
  TensorView StepToHost(std::span<const Chunk> chunks);

 private:
  struct Sequence {
    int length = 0;
    std::vector<int32_t> blocks;
  };

  int32_t TakeBlock();

  Model& model_;
  Ops& ops_;
  std::mt19937_64 random_;
  const int num_blocks_;
  std::vector<Buffer> layers_;        // [num_layers], one layer's cache each
  std::vector<KvLayerView> views_;    // of layers_
  std::vector<int32_t> free_blocks_;  // in the order in which they will be taken, from the back
  std::vector<Sequence> sequences_;
  Buffer arrays_;                   // a step's, on the device; grows
  std::vector<float> host_logits_;  // of StepToHost
};

}  // namespace gloam
