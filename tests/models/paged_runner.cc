#include "tests/models/paged_runner.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "base/check.h"

namespace gloam {

PagedRunner::PagedRunner(Model& model, Ops& ops, DType kv_dtype, int num_blocks, uint64_t seed)
    : model_(model), random_(seed), num_blocks_(num_blocks) {
  const ModelConfig& config = model.config();
  const KvLayout layout = {
      .dtype = kv_dtype, .num_kv_heads = config.num_kv_heads, .head_dim = config.head_dim};
  for (int i = 0; i < config.num_layers; ++i) {
    auto buffer = ops.Allocate(layout.block_bytes() * num_blocks);
    GLOAM_CHECK(buffer.ok());
    // Touches the memory: a bench should not time the kernel's first hand-out of its pages.
    std::memset(buffer->data(), 0, buffer->bytes());
    layers_.push_back(std::move(*buffer));
    views_.push_back({.data = layers_.back().data(), .layout = layout, .num_blocks = num_blocks});
  }
  Clear();
}

int PagedRunner::AddSequence() {
  sequences_.emplace_back();
  return static_cast<int>(sequences_.size()) - 1;
}

int PagedRunner::Copy(int sequence) {
  const int copy = AddSequence();
  sequences_[copy].length = sequences_[sequence].length;
  for (const int32_t block : sequences_[sequence].blocks) {
    const int32_t target = TakeBlock();
    sequences_[copy].blocks.push_back(target);
    for (const KvLayerView& view : views_) {
      auto* data = static_cast<std::byte*>(view.data);
      const int64_t bytes = view.layout.block_bytes();
      std::memcpy(data + target * bytes, data + block * bytes, bytes);
    }
  }
  return copy;
}

void PagedRunner::Clear() {
  sequences_.clear();
  free_blocks_.resize(num_blocks_);
  std::iota(free_blocks_.begin(), free_blocks_.end(), 0);
  std::shuffle(free_blocks_.begin(), free_blocks_.end(), random_);
}

int32_t PagedRunner::TakeBlock() {
  GLOAM_CHECK(!free_blocks_.empty());
  const int32_t block = free_blocks_.back();
  free_blocks_.pop_back();
  return block;
}

TensorView PagedRunner::Step(std::span<const Chunk> chunks) {
  std::vector<int32_t> token_ids, positions, cu_seqlens = {0}, context_lens, logit_rows;
  std::vector<int64_t> slots;
  size_t max_blocks = 0;
  for (const Chunk& chunk : chunks) {
    Sequence& sequence = sequences_[chunk.sequence];
    for (const int row : chunk.logit_rows) logit_rows.push_back(cu_seqlens.back() + row);
    for (const int32_t token : chunk.tokens) {
      const int position = sequence.length++;
      if (position % kBlockTokens == 0) sequence.blocks.push_back(TakeBlock());
      token_ids.push_back(token);
      positions.push_back(position);
      slots.push_back(int64_t{sequence.blocks.back()} * kBlockTokens + position % kBlockTokens);
    }
    cu_seqlens.push_back(static_cast<int32_t>(token_ids.size()));
    context_lens.push_back(sequence.length);
    max_blocks = std::max(max_blocks, sequence.blocks.size());
  }
  std::vector<int32_t> block_tables;
  for (const Chunk& chunk : chunks) {
    std::vector<int32_t> row = sequences_[chunk.sequence].blocks;
    row.resize(max_blocks, -1);
    block_tables.insert(block_tables.end(), row.begin(), row.end());
  }
  return model_.Forward({.seqs = {.num_seqs = static_cast<int>(chunks.size()),
                                  .num_tokens = static_cast<int>(token_ids.size()),
                                  .max_blocks_per_seq = static_cast<int>(max_blocks),
                                  .positions = positions.data(),
                                  .slot_mapping = slots.data(),
                                  .cu_seqlens = cu_seqlens.data(),
                                  .context_lens = context_lens.data(),
                                  .block_tables = block_tables.data()},
                         .token_ids = token_ids.data(),
                         .logit_rows = logit_rows.data(),
                         .num_logit_rows = static_cast<int>(logit_rows.size()),
                         .kv = views_});
}

}  // namespace gloam
