// BlockManager: which sequence holds which blocks of the KV cache. Counts references (a prefix may
// be shared), hands out free blocks, and keeps the contents of freed blocks findable until they are
// needed again. Owned by the engine's Scheduler; engine thread only; no device code.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/prefix_cache.h"

namespace gloam {

// The blocks of one sequence, in order of position. Changed by BlockManager alone.
struct BlockTable {
  std::vector<int32_t> blocks;
  int num_committed = 0;              // leading blocks whose contents the prefix cache was told
  ContentId content = kEmptyContent;  // the text of those blocks
  uint64_t version = 0;               // differs whenever `blocks` did more than grow
};

inline int BlocksFor(int64_t num_tokens) {
  return static_cast<int>((num_tokens + kBlockTokens - 1) / kBlockTokens);
}

class BlockManager {
 public:
  BlockManager(int64_t num_blocks, bool enable_prefix_caching);

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()) + num_cached_free_; }
  int64_t num_in_use() const { return num_blocks() - num_free(); }  // held by sequences
  bool prefix_caching() const { return prefix_caching_; }

  // The longest run of cached blocks that `tokens` begins with, leaving at least the last token
  // out. Nothing changes. The result is valid until the next call of a non-const member.
  struct PrefixMatch {
    std::vector<int32_t> blocks;
    ContentId content = kEmptyContent;
    int num_unreferenced = 0;  // of them, blocks that count as free now
    int num_tokens() const { return static_cast<int>(blocks.size()) * kBlockTokens; }
  };
  const PrefixMatch& FindPrefix(std::span<const int32_t> tokens);

  // Makes `table`, which must be empty, begin with the blocks of `match`.
  void Attach(const PrefixMatch& match, BlockTable& table);

  // Appends blocks until `table` has room for `num_tokens`. False, and nothing changes, when too
  // few are free.
  [[nodiscard]] bool Grow(BlockTable& table, int64_t num_tokens);

  // Tells the prefix cache about blocks of `table` that are full now: the first `num_computed` of
  // `tokens` have their keys and values in the cache.
  void CommitFullBlocks(BlockTable& table, std::span<const int32_t> tokens, int num_computed);

  // Gives all blocks back; `table` is empty afterwards.
  void Release(BlockTable& table);

  // Every block is in exactly one state, and reference counts equal the tables, which must be all
  // that exist. Errors: kInternal saying what is inconsistent.
  [[nodiscard]] Status CheckIntegrity(std::span<const BlockTable* const> tables) const;

 private:
  // A block is in use (num_refs > 0), free with contents worth keeping (linked in the LRU list), or
  // free (in `free_`).
  struct Block {
    int num_refs = 0;
    int32_t prev = -1;  // LRU neighbours: older, newer; -1 at the ends
    int32_t next = -1;
    bool in_lru = false;
  };

  int32_t Take();
  void Unref(int32_t block);
  void LruPushNewest(int32_t block);
  void LruRemove(int32_t block);

  const bool prefix_caching_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;  // without contents, a stack
  int32_t lru_oldest_ = -1;
  int32_t lru_newest_ = -1;
  int64_t num_cached_free_ = 0;
  PrefixCache cache_;
  PrefixMatch match_;
  uint64_t last_version_ = 0;
};

}  // namespace gloam
