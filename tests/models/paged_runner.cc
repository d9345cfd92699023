#include "tests/models/paged_runner.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <numeric>

#include "base/check.h"

namespace gloam {
namespace {

// Arrays of a step one after another, as they go to the device.
class ArrayPacker {
 public:
  // Where `values` begins.
  template <typename T>
  size_t Add(const std::vector<T>& values) {
    constexpr size_t kAlignment = 64;
    const size_t begin = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
    bytes_.resize(begin + values.size() * sizeof(T));
    if (!values.empty())
      std::memcpy(bytes_.data() + begin, values.data(), values.size() * sizeof(T));
    return begin;
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

}  // namespace

Status ReserveSteps(Model& model, Ops& ops, DType kv_dtype, int max_tokens, int max_logit_rows) {
  const ModelConfig& config = model.config();
  GLOAM_RETURN_IF_ERROR(model.Reserve(max_tokens, max_logit_rows));
  return ops.Reserve({.max_tokens = max_tokens,
                      .max_seqs = max_tokens,
                      .max_context = config.max_position,
                      .max_logit_rows = max_logit_rows,
                      .num_heads = config.num_heads,
                      .num_kv_heads = config.num_kv_heads,
                      .head_dim = config.head_dim,
                      .hidden_size = config.hidden_size,
                      .intermediate_size = config.intermediate_size,
                      .vocab_size = config.vocab_size,
                      .kv_dtype = kv_dtype});
}

PagedRunner::PagedRunner(Model& model, Ops& ops, DType kv_dtype, int num_blocks, uint64_t seed)
    : model_(model), ops_(ops), random_(seed), num_blocks_(num_blocks) {
  const ModelConfig& config = model.config();
  const KvLayout layout = {
      .dtype = kv_dtype, .num_kv_heads = config.num_kv_heads, .head_dim = config.head_dim};
  for (int i = 0; i < config.num_layers; ++i) {
    auto buffer = ops.Allocate(layout.block_bytes() * num_blocks);
    GLOAM_CHECK(buffer.ok());
    // Touches the memory: a bench should not time the kernel's first hand-out of its pages.
    if (ops.device() == Device::kCpu) std::memset(buffer->data(), 0, buffer->bytes());
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
      std::vector<std::byte> contents(view.layout.block_bytes());
      const auto bytes = static_cast<int64_t>(contents.size());
      ops_.Download(contents.data(), data + block * bytes, contents.size());
      ops_.Upload(data + target * bytes, contents.data(), contents.size());
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
  ArrayPacker packer;
  const size_t tokens_at = packer.Add(token_ids), positions_at = packer.Add(positions),
               slots_at = packer.Add(slots), seqlens_at = packer.Add(cu_seqlens),
               contexts_at = packer.Add(context_lens), tables_at = packer.Add(block_tables),
               rows_at = packer.Add(logit_rows);
  const size_t num_bytes = packer.bytes().size();
  if (arrays_.bytes() < num_bytes) {
    auto buffer = ops_.Allocate(2 * num_bytes);
    GLOAM_CHECK(buffer.ok());
    arrays_ = std::move(*buffer);
  }
  ops_.Upload(arrays_.data(), packer.bytes().data(), num_bytes);
  const auto int32s = [this](size_t at) {
    return reinterpret_cast<const int32_t*>(static_cast<const std::byte*>(arrays_.data()) + at);
  };
  const LogitRows logits =
      model_.Forward({.seqs = {.num_seqs = static_cast<int>(chunks.size()),
                               .num_tokens = static_cast<int>(token_ids.size()),
                               .max_blocks_per_seq = static_cast<int>(max_blocks),
                               .positions = int32s(positions_at),
                               .slot_mapping = reinterpret_cast<const int64_t*>(int32s(slots_at)),
                               .cu_seqlens = int32s(seqlens_at),
                               .context_lens = int32s(contexts_at),
                               .block_tables = int32s(tables_at),
                               .host_cu_seqlens = cu_seqlens.data(),
                               .host_context_lens = context_lens.data()},
                      .token_ids = int32s(tokens_at),
                      .logit_rows = int32s(rows_at),
                      .num_logit_rows = static_cast<int>(logit_rows.size()),
                      .kv = views_});
  return logits.values;
}

TensorView PagedRunner::StepToHost(std::span<const Chunk> chunks) {
  TensorView logits = Step(chunks);
  host_logits_.resize(logits.shape[0] * logits.strides[0]);
  ops_.Download(host_logits_.data(), logits.data, host_logits_.size() * sizeof(float));
  logits.data = host_logits_.data();
  logits.device = Device::kCpu;
  return logits;
}

}  // namespace gloam
