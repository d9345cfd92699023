// PagedForcedDecoder: ForcedDecoder over the engine's ModelRunner and a KV cache of its own. One
// thread.
//
// Where results do not depend on how tokens are cut into steps (the CPU backend), the dense row is
// scored several tokens at a time, ahead of the others.
#pragma once

#include <vector>

#include "engine/kv_cache_pool.h"
#include "engine/model_runner.h"
#include "eval/forced_decoder.h"
#include "models/model.h"

namespace gloam {

struct ForcedDecoderLimits {
  int max_context = 0;          // tokens of the shared context
  int max_decoded = 0;          // tokens that are fed after it
  int max_rows = 0;             // policies
  int max_compressed_rows = 0;  // of them, with a compressor: these prefill the context's end anew
  int max_window = 0;           // of the compressors
  DType kv_dtype = DType::kBF16;
  SidecarConfig sidecars;  // what the policies read
};

class PagedForcedDecoder final : public ForcedDecoder {
 public:
  // `ops` and `model` must outlive the decoder. Errors: kResourceExhausted, kInvalidArgument when
  // the model's context is too short.
  [[nodiscard]] static StatusOr<std::unique_ptr<PagedForcedDecoder>> Create(
      const ForcedDecoderLimits& limits, Ops& ops, Model& model);

  [[nodiscard]] Status Start(std::span<const int32_t> context, std::span<const int32_t> tokens,
                             RowPolicies policies) override;
  Step Next() override;

 private:
  PagedForcedDecoder(const ForcedDecoderLimits& limits, Model& model, KvCachePool pool,
                     ModelRunner runner, int num_blocks, int dense_chunk);

  // Computes tokens up to `end` of one sequence, in steps of at most kChunk tokens.
  void Prefill(Sequence& sequence, int end);
  void GrowTable(Sequence& sequence, int num_tokens);
  // Feeds the dense row up to dense_chunk_ tokens and keeps their logits.
  void ScoreDense();

  const ForcedDecoderLimits limits_;
  Model& model_;
  KvCachePool pool_;
  ModelRunner runner_;
  const int num_blocks_;
  const int dense_chunk_;
  int num_taken_ = 0;          // blocks are handed out in order
  uint64_t last_version_ = 0;  // of block tables
  std::span<const int32_t> tokens_;
  size_t num_fed_ = 0;
  std::vector<Sequence> rows_;       // dense first
  std::vector<float> dense_logits_;  // [dense_chunk_, vocab_size]
};

}  // namespace gloam
