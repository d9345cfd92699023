// The arithmetic of attention: a tile of query rows of one KV head against one partition of the
// context. Plan and threads are in attention.cc.
//
// A row's result is one fixed sequence of operations, whatever tile it is computed in: the context
// is cut into partitions of kPartitionTokens at absolute positions; inside a partition, groups of
// kGroupTokens go through an online softmax in ascending order; partials of the partitions are
// folded in ascending order. Masked positions contribute exactly zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/paged_kv.h"

namespace gloam::cpu {

inline constexpr int kPartitionTokens = 512;
inline constexpr int kGroupBlocks = 2;
inline constexpr int kGroupTokens = kGroupBlocks * kBlockTokens;

// Neighbouring KV heads of a tile whose keys and values of a group are read together.
inline constexpr int kHeadsAtOnce = 4;

// Some blocks of some neighbouring KV heads.
struct HeadBlocks {
  int kv_head = 0;  // the first
  int num_kv_heads = 0;
  const int32_t* blocks = nullptr;
  int64_t num_blocks = 0;
};

// Query rows of some neighbouring KV heads: `num_tokens` consecutive tokens of a sequence, each
// with the `heads_per_kv` query heads that share a KV head.
// Row = (KV head of the tile * num_tokens + token) * heads_per_kv + head.
// A group's keys and values of all these heads are read before the next group's: in a block they
// lie side by side, and memory gives long runs several times faster than pieces of 2 KiB (EPYC
// Zen 4, 2 threads: 12 KiB at 55 GB/s, 2 KiB of every 6 KiB at 11 GB/s, 2026-11-23).
struct AttentionTile {
  KvLayerView kv;
  int kv_head = 0;  // the first
  int num_kv_heads = 1;
  const int32_t* block_table = nullptr;  // of the sequence
  int num_tokens = 0;
  int heads_per_kv = 0;
  int64_t first_position = 0;  // of the first token; the others follow
  int64_t window = 0;          // tokens that a query sees, itself included
  // Of tiles with one token and KV head, per row and group of the block table: which tokens the row
  // sees (bit i: token i of the group), [heads_per_kv][row_mask_stride]. Null: all.
  const uint32_t* row_masks = nullptr;
  int64_t row_mask_stride = 0;
  // Of tiles with one token and KV head: logits to use instead of q . k,
  // [heads_per_kv][logits_stride].
  const float* logits = nullptr;
  int64_t logits_stride = 0;
  // Of tiles with one token and KV head: the addresses of the keys, by position, up to the end of
  // the last one's block of 16; values lie `values_offset` bytes further. Null: in the blocks.
  const std::byte* const* rows = nullptr;
  int64_t values_offset = 0;
  // Of tiles without `rows`: what this thread reads after the partition; it comes with the
  // partition's last group.
  HeadBlocks next;

  int rows_per_kv_head() const { return num_tokens * heads_per_kv; }
  int num_rows() const { return num_kv_heads * rows_per_kv_head(); }
  // Positions [begin, end) that some row sees.
  int64_t begin() const { return first_position < window ? 0 : first_position - window + 1; }
  int64_t end() const { return first_position + num_tokens; }
};

// Unnormalised result of rows over a part of the context: softmax numerators times V, their sum,
// and the score that they are relative to.
struct AttentionPartial {
  float* acc = nullptr;  // [num_rows, head_dim]
  float* sum = nullptr;  // [num_rows]
  float* max = nullptr;  // [num_rows]
};

// Memory that one thread works in; all 64-byte aligned.
struct TileWorkspace {
  float* queries = nullptr;          // [num_rows, head_dim], scaled
  float* ordered_queries = nullptr;  // [num_rows, head_dim]
  float* keys = nullptr;             // [head_dim, kGroupTokens]
  float* values = nullptr;           // [kGroupTokens, head_dim]
  float* probs = nullptr;            // [num_rows, kGroupTokens]
  float* lane_sums = nullptr;        // [num_rows, kBlockTokens]
};

// Attends to the positions of `partition` that lie in the tile's range.
void AttendPartition(const AttentionTile& tile, int64_t partition, const TileWorkspace& workspace,
                     const AttentionPartial& result);

// total := total + part. A total starts as ClearPartial leaves it.
void ClearPartial(const AttentionPartial& total, int num_rows, int head_dim);
void FoldPartial(const AttentionPartial& total, const AttentionPartial& part, int num_rows,
                 int head_dim);

// out[i] = in[i] * scale. Used to stage queries and to normalise results.
void ScaleRow(const float* in, float scale, int count, float* out);

}  // namespace gloam::cpu
