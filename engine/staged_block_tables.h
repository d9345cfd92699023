// StagedBlockTables: the block tables of a step's sequences, a row each, where the device reads
// them. What a row holds already is remembered: a sequence that stays in its row and grows costs
// its new blocks only. Owned by ModelRunner; engine thread only.
#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "engine/block_manager.h"
#include "kernels/ops.h"

namespace gloam {

class StagedBlockTables {
 public:
  // Errors: kResourceExhausted.
  [[nodiscard]] static StatusOr<StagedBlockTables> Create(Ops& ops, int max_num_seqs,
                                                          int max_blocks_per_seq);

  // Between Ops::BeginStep and Stage. `table` may be known to no BlockManager if its version
  // differs from every other table's.
  void Fill(int row, const BlockTable& table);
  // Brings what Fill changed to the device.
  void Stage(Ops& ops);
  // The next Fill of `row` writes all of it.
  void Forget(int row) { rows_[row] = {}; }

  int max_blocks_per_seq() const { return max_blocks_per_seq_; }
  const int32_t* device() const { return static_cast<const int32_t*>(buffer_.device_data()); }

 private:
  struct Row {
    uint64_t version = 0;
    size_t num_blocks = 0;
  };
  struct Change {
    size_t begin = 0;  // bytes of the buffer
    size_t end = 0;
  };

  StagedBlockTables(StagedBuffer buffer, int max_num_seqs, int max_blocks_per_seq);

  StagedBuffer buffer_;  // [max_num_seqs, max_blocks_per_seq] int32
  int max_blocks_per_seq_;
  std::vector<Row> rows_;        // [max_num_seqs]
  std::vector<Change> changes_;  // since the last Stage, at most one a row
};

}  // namespace gloam
