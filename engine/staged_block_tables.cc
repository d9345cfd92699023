#include "engine/staged_block_tables.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace gloam {
namespace {

// Changes of several rows go in one copy, with what lies between them, when that is no more than so
// many bytes for each.
constexpr size_t kBytesPerCopy = size_t{64} << 10;

}  // namespace

StagedBlockTables::StagedBlockTables(StagedBuffer buffer, int max_num_seqs, int max_blocks_per_seq)
    : buffer_(std::move(buffer)), max_blocks_per_seq_(max_blocks_per_seq), rows_(max_num_seqs) {
  changes_.reserve(max_num_seqs);
}

StatusOr<StagedBlockTables> StagedBlockTables::Create(Ops& ops, int max_num_seqs,
                                                      int max_blocks_per_seq) {
  GLOAM_ASSIGN_OR_RETURN(
      StagedBuffer buffer,
      ops.AllocateStaged(size_t(max_num_seqs) * max_blocks_per_seq * sizeof(int32_t)));
  return StagedBlockTables(std::move(buffer), max_num_seqs, max_blocks_per_seq);
}

void StagedBlockTables::Fill(int row, const BlockTable& table) {
  const size_t num_blocks = table.blocks.size();
  GLOAM_CHECK(num_blocks <= static_cast<size_t>(max_blocks_per_seq_));
  Row& filled = rows_[row];
  if (filled.version != table.version) filled = {.version = table.version, .num_blocks = 0};
  if (filled.num_blocks == num_blocks) return;
  const size_t first = static_cast<size_t>(row) * max_blocks_per_seq_;
  std::copy(table.blocks.begin() + static_cast<std::ptrdiff_t>(filled.num_blocks),
            table.blocks.end(),
            static_cast<int32_t*>(buffer_.host_data()) + first + filled.num_blocks);
  changes_.push_back({.begin = (first + filled.num_blocks) * sizeof(int32_t),
                      .end = (first + num_blocks) * sizeof(int32_t)});
  filled.num_blocks = num_blocks;
}

void StagedBlockTables::Stage(Ops& ops) {
  if (changes_.empty()) return;
  const auto [first, last] =
      std::minmax_element(changes_.begin(), changes_.end(),
                          [](const Change& a, const Change& b) { return a.begin < b.begin; });
  const size_t span_bytes = last->end - first->begin;
  if (span_bytes <= changes_.size() * kBytesPerCopy) {
    ops.Stage(buffer_, first->begin, span_bytes);
  } else {
    for (const Change& change : changes_)
      ops.Stage(buffer_, change.begin, change.end - change.begin);
  }
  changes_.clear();
}

}  // namespace gloam
