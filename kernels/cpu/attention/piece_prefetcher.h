// Fetches the keys and values that an attention tile reads next into the L2 cache, a few cache
// lines at a time between its steps: a burst of prefetches would hold up the loads behind it. On
// the thread that attends.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention/tile.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/paged_kv.h"

namespace gloam::cpu {

// The cache lines of pieces of keys and values, in the order in which they are read.
class PiecePrefetcher {
 public:
  // Some KV heads' keys and values in some blocks: keys of all these heads are one piece of a
  // block, values the next.
  static PiecePrefetcher OfBlocks(const KvLayerView& kv, int kv_head, int num_kv_heads,
                                  const int32_t* blocks, int64_t num_blocks) {
    const int64_t run_bytes = RowBytes(kv) * kBlockTokens;
    PiecePrefetcher prefetcher(num_kv_heads * run_bytes, num_blocks);
    prefetcher.blocks_ = blocks;
    prefetcher.base_ = static_cast<const std::byte*>(kv.data) + kv_head * run_bytes;
    prefetcher.block_bytes_ = kv.layout.block_bytes();
    prefetcher.values_offset_ = kv.layout.num_kv_heads * run_bytes;
    return prefetcher;
  }
  // One head's keys at these addresses and the values that go with them.
  static PiecePrefetcher OfRows(const KvLayerView& kv, const std::byte* const* rows,
                                int64_t num_rows, int64_t values_offset) {
    PiecePrefetcher prefetcher(RowBytes(kv), num_rows);
    prefetcher.rows_ = rows;
    prefetcher.values_offset_ = values_offset;
    return prefetcher;
  }

  int64_t NumLines() const { return num_pieces_ * ((piece_bytes_ + kLineBytes - 1) / kLineBytes); }

  void Advance(int64_t num_lines) {
    for (; num_lines > 0; --num_lines, at_ += kLineBytes) {
      if (at_ >= end_ && !NextPiece()) return;
      PrefetchRange(at_, kLineBytes);
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  PiecePrefetcher(int64_t piece_bytes, int64_t num_pairs)
      : piece_bytes_(piece_bytes), num_pieces_(2 * num_pairs) {}

  static int64_t RowBytes(const KvLayerView& kv) {
    return kv.layout.head_dim * static_cast<int64_t>(DTypeBytes(kv.layout.dtype));
  }

  bool NextPiece() {
    if (piece_ == num_pieces_) return false;
    at_ = rows_ != nullptr ? rows_[piece_ / 2] : base_ + blocks_[piece_ / 2] * block_bytes_;
    at_ += piece_ % 2 * values_offset_;
    end_ = at_ + piece_bytes_;
    ++piece_;
    return true;
  }

  int64_t piece_bytes_;
  int64_t num_pieces_;
  const int32_t* blocks_ = nullptr;
  const std::byte* base_ = nullptr;  // of block 0
  int64_t block_bytes_ = 0;
  const std::byte* const* rows_ = nullptr;
  int64_t values_offset_ = 0;
  int64_t piece_ = 0;
  const std::byte* at_ = nullptr;
  const std::byte* end_ = nullptr;
};

// What one of the steps of a tile's group asks for.
struct PrefetchStep {
  PiecePrefetcher* pieces = nullptr;
  int64_t num_lines = 0;

  void operator()() const { pieces->Advance(num_lines); }
};

// Steps of one head in a group: four a block of keys, and as many of values.
constexpr int kPrefetchSteps = 8 * kGroupBlocks;

}  // namespace gloam::cpu
