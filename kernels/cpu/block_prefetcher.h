// Fetches the keys and values that an attention tile reads next into the L2 cache, a few cache
// lines at a time between its steps: a burst of prefetches would hold up the loads behind it. On
// the thread that attends.
#pragma once

#include <cstdint>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/paged_kv.h"

namespace gloam::cpu {

// The cache lines of some KV heads' keys and values in some blocks, in the order in which they lie
// in memory.
class BlockPrefetcher {
 public:
  BlockPrefetcher(const KvLayerView& kv, int kv_head, int num_kv_heads, const int32_t* blocks,
                  int64_t num_blocks)
      : kv_(kv), blocks_(blocks), num_pieces_(2 * num_blocks) {
    run_bytes_ = kv.layout.head_run_elements() * static_cast<int64_t>(DTypeBytes(kv.layout.dtype));
    offset_bytes_ = kv_head * run_bytes_;
    piece_bytes_ = num_kv_heads * run_bytes_;
  }

  int64_t NumLines() const { return num_pieces_ * piece_bytes_ / kLineBytes; }

  void Advance(int64_t num_lines) {
    for (; num_lines > 0; --num_lines, at_ += kLineBytes) {
      if (at_ == end_ && !NextPiece()) return;
      PrefetchRange(at_, kLineBytes);
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  // Keys of the tile's heads are one piece of a block, values the next.
  bool NextPiece() {
    if (piece_ == num_pieces_) return false;
    at_ = static_cast<const char*>(kv_.data) + blocks_[piece_ / 2] * kv_.layout.block_bytes() +
          piece_ % 2 * kv_.layout.num_kv_heads * run_bytes_ + offset_bytes_;
    end_ = at_ + piece_bytes_;
    ++piece_;
    return true;
  }

  const KvLayerView& kv_;
  const int32_t* blocks_;
  int64_t num_pieces_;
  int64_t run_bytes_ = 0;
  int64_t offset_bytes_ = 0;
  int64_t piece_bytes_ = 0;
  int64_t piece_ = 0;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

// What one of the steps of a tile's group asks for.
struct PrefetchStep {
  BlockPrefetcher* blocks = nullptr;
  int64_t num_lines = 0;

  void operator()() const { blocks->Advance(num_lines); }
};

// Steps of one head in a group: four a block of keys, and as many of values.
constexpr int kPrefetchSteps = 8 * kGroupBlocks;

}  // namespace gloam::cpu
