#include "kernels/cuda/prefill/plan.h"

#include <algorithm>
#include <numeric>
#include <queue>

#include "base/check.h"
#include "kernels/paged_kv.h"

namespace gloam::cuda {
namespace {

constexpr int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace

std::vector<PlacedBlocks> PlaceBlocks(std::span<const PrefillSeq> seqs, int window_left,
                                      int workspace_blocks) {
  std::vector<PlacedBlocks> placed;
  int used = 0;
  for (const PrefillSeq& seq : seqs) {
    const int first_token = window_left < 0 ? 0 : std::max(0, seq.kv_len - seq.q_len - window_left);
    const int first = first_token / kBlockTokens;
    const int count = CeilDiv(seq.kv_len, kBlockTokens) - first;
    GLOAM_CHECK(count <= workspace_blocks);
    if (used + count > workspace_blocks) used = 0;
    placed.push_back({.first = first, .count = count, .place = used});
    used += count;
  }
  return placed;
}

PrefillSplit SplitPrefill(std::span<const PrefillSeq> seqs, const PrefillShape& shape) {
  // A sequence of fewer rows would leave most of its tile empty.
  constexpr int kMinRows = 64;
  PrefillSplit split;
  int64_t num_blocks = 0;
  for (const PrefillSeq& seq : seqs) {
    if (seq.q_len >= kMinRows) {
      split.fa3.push_back(seq);
      num_blocks += int64_t{CeilDiv(seq.q_len, Fa3TileRows(shape.head_dim))} * shape.num_heads;
    } else {
      split.fa2.push_back(seq);
    }
  }
  // Half a GPU of FA3 is about as fast as a full one of FA2, which can split contexts.
  if (2 * num_blocks < shape.num_sms) {
    split.fa2.assign(seqs.begin(), seqs.end());
    split.fa3.clear();
  }
  return split;
}

int64_t MaxFa3Works(int64_t max_tokens, int64_t max_seqs, int num_heads, int head_dim) {
  return (max_tokens / Fa3TileRows(head_dim) + max_seqs) * num_heads;
}

Fa3Plan PlanFa3(std::span<const PrefillSeq> seqs, const PrefillShape& shape) {
  const int tile_rows = Fa3TileRows(shape.head_dim);
  std::vector<int> order(seqs.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return seqs[a].kv_len != seqs[b].kv_len ? seqs[a].kv_len > seqs[b].kv_len : a < b;
  });

  // The next tile, in descending order of work per head, goes to the block with the least so far.
  struct Block {
    int64_t cost;
    int index;
    bool operator>(const Block& other) const {
      return cost != other.cost ? cost > other.cost : index > other.index;
    }
  };
  std::vector<Block> idle(shape.num_sms);
  for (int i = 0; i < shape.num_sms; ++i) idle[i] = {.cost = 0, .index = i};
  std::priority_queue<Block, std::vector<Block>, std::greater<>> blocks(std::greater<>{},
                                                                        std::move(idle));
  std::vector<std::vector<Fa3Work>> works(shape.num_sms);
  for (int head = 0; head < shape.num_heads; ++head) {
    for (const int index : order) {
      const PrefillSeq& seq = seqs[index];
      for (int tile = CeilDiv(seq.q_len, tile_rows) - 1; tile >= 0; --tile) {
        const int end = std::min((tile + 1) * tile_rows, seq.q_len);
        int64_t kv_tokens = seq.kv_len - seq.q_len + end;
        if (shape.window_left >= 0) {
          kv_tokens = std::min<int64_t>(kv_tokens, shape.window_left + tile_rows);
        }
        Block block = blocks.top();
        blocks.pop();
        works[block.index].push_back({.head = head, .tile = tile, .index = index});
        block.cost += kv_tokens + 2 * tile_rows;  // a tile's own cost, whatever its context
        blocks.push(block);
      }
    }
  }

  Fa3Plan plan;
  plan.begins.push_back(0);
  for (const std::vector<Fa3Work>& block_works : works) {
    plan.works.insert(plan.works.end(), block_works.begin(), block_works.end());
    plan.begins.push_back(static_cast<int>(plan.works.size()));
  }
  return plan;
}

Fa2Plan PlanFa2(std::span<const PrefillSeq> seqs, const PrefillShape& shape) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  Fa2Plan plan;
  int64_t num_rows = 0;
  for (const PrefillSeq& seq : seqs) num_rows += seq.q_len * group;
  const bool many_rows = num_rows > int64_t{64} * static_cast<int64_t>(seqs.size());
  plan.tile_rows = many_rows ? kMaxFa2TileRows : 64;

  // The context that a tile may see; the kernel counts its pieces in the same way.
  const auto visible = [&](const PrefillSeq& seq) -> int64_t {
    return shape.window_left < 0
               ? seq.kv_len
               : std::min<int64_t>(seq.kv_len, shape.window_left + plan.tile_rows);
  };
  const auto num_tiles = [&](const PrefillSeq& seq) {
    return CeilDiv(seq.q_len * group, plan.tile_rows);
  };
  int64_t longest = 0;
  for (const PrefillSeq& seq : seqs) longest = std::max(longest, visible(seq));
  // The smallest pieces that do not make more thread blocks than run at once.
  for (int64_t piece = 256; piece < longest; piece += 128) {
    int64_t num_blocks = 0;
    for (const PrefillSeq& seq : seqs) {
      num_blocks += int64_t{num_tiles(seq)} * CeilDiv(visible(seq), piece) * shape.num_kv_heads;
    }
    if (num_blocks <= MaxSplitBlocks(shape.num_sms)) {
      plan.piece_tokens = static_cast<int>(piece);
      break;
    }
  }

  int most_tiles = 0;
  for (const PrefillSeq& seq : seqs) {
    plan.num_pieces.push_back(plan.piece_tokens == 0 ? 1
                                                     : CeilDiv(visible(seq), plan.piece_tokens));
    most_tiles = std::max(most_tiles, num_tiles(seq));
  }
  // A sequence's last tiles see the most: they start first.
  for (int back = 0; back < most_tiles; ++back) {
    for (int index = 0; index < static_cast<int>(seqs.size()); ++index) {
      const int tile = num_tiles(seqs[index]) - 1 - back;
      if (tile < 0) continue;
      for (int piece = 0; piece < plan.num_pieces[index]; ++piece) {
        plan.works.push_back({.index = index, .tile = tile, .piece = piece});
      }
    }
  }
  return plan;
}

}  // namespace gloam::cuda
