// Work lists of a step's prefill attention: which thread block computes what. Pure functions of the
// lengths; no device code.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace gloam::cuda {

// A sequence of the step that has more than one token.
struct PrefillSeq {
  int table_begin = 0;  // in the flat block tables
  int q_begin = 0;      // first row of q and out
  int q_len = 0;
  int kv_len = 0;  // context including this step's tokens
};

struct PrefillShape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int window_left = -1;  // tokens before its own that a query sees; -1: all
  int num_sms = 0;
};

// Which sequences FA3's kernel takes; the others are FA2's. FA3 has a thread block per 128 or 192
// query rows of one head and does not split contexts: it needs enough rows to fill the GPU.
struct PrefillSplit {
  std::vector<PrefillSeq> fa3;
  std::vector<PrefillSeq> fa2;
};
PrefillSplit SplitPrefill(std::span<const PrefillSeq> seqs, const PrefillShape& shape);

constexpr int Fa3TileRows(int head_dim) { return head_dim == 64 ? 192 : 128; }

// One tile of one head of one sequence.
struct Fa3Work {
  int head = 0;
  int tile = 0;
  int index = 0;  // of the sequence among those planned
};
// Work items grouped by thread block (one per multiprocessor), with about equal sums of work;
// block i has [begins[i], begins[i + 1]).
struct Fa3Plan {
  std::vector<Fa3Work> works;
  std::vector<int> begins;  // [num_sms + 1]
};
Fa3Plan PlanFa3(std::span<const PrefillSeq> seqs, const PrefillShape& shape);
int64_t MaxFa3Works(int64_t max_tokens, int64_t max_seqs, int num_heads, int head_dim);

// One tile of query rows (the heads of a group count as rows) over one piece of the context.
struct Fa2Work {
  int index = 0;  // of the sequence among those planned
  int tile = 0;
  int piece = 0;
};
struct Fa2Plan {
  int tile_rows = 0;     // 64 or 128
  int piece_tokens = 0;  // 0: contexts are not split
  std::vector<Fa2Work> works;
  std::vector<int> num_pieces;  // [seqs] of each row's context
};
// Splits contexts where the tiles alone do not fill the GPU.
Fa2Plan PlanFa2(std::span<const PrefillSeq> seqs, const PrefillShape& shape);

// The blocks of a sequence that its queries see, and where they go in a workspace.
struct PlacedBlocks {
  int first = 0;  // of the sequence
  int count = 0;
  int place = 0;  // of the first in the workspace
};
// [seqs]. Sequences that the workspace holds together are a group, which begins at place 0; it
// holds any one of them.
std::vector<PlacedBlocks> PlaceBlocks(std::span<const PrefillSeq> seqs, int window_left,
                                      int workspace_blocks);

inline constexpr int kMaxFa2TileRows = 128;
// Thread blocks of a plan that splits contexts.
constexpr int MaxSplitBlocks(int num_sms) { return 2 * num_sms; }

}  // namespace gloam::cuda
