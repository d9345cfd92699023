#include "engine/block_manager.h"

#include "base/check.h"

namespace gloam {

BlockManager::BlockManager(int64_t num_blocks, bool enable_prefix_caching)
    : prefix_caching_(enable_prefix_caching), blocks_(num_blocks), cache_(num_blocks) {
  free_.reserve(num_blocks);
  for (int64_t block = num_blocks - 1; block >= 0; --block) {
    free_.push_back(static_cast<int32_t>(block));  // block 0 is taken first
  }
}

const BlockManager::PrefixMatch& BlockManager::FindPrefix(std::span<const int32_t> tokens) {
  match_.blocks.clear();
  match_.content = kEmptyContent;
  match_.num_unreferenced = 0;
  if (!prefix_caching_) return match_;
  for (size_t end = kBlockTokens; end < tokens.size(); end += kBlockTokens) {
    const auto entry =
        cache_.Find(match_.content, tokens.subspan(end - kBlockTokens, kBlockTokens));
    if (!entry) break;
    match_.blocks.push_back(entry->block);
    match_.content = entry->content;
    if (blocks_[entry->block].num_refs == 0) ++match_.num_unreferenced;
  }
  return match_;
}

void BlockManager::Attach(const PrefixMatch& match, BlockTable& table) {
  GLOAM_CHECK(table.blocks.empty());
  for (int32_t block : match.blocks) {
    if (blocks_[block].num_refs++ == 0) LruRemove(block);
  }
  table.blocks.assign(match.blocks.begin(), match.blocks.end());
  table.num_committed = static_cast<int>(match.blocks.size());
  table.content = match.content;
  table.version = ++last_version_;
}

bool BlockManager::Grow(BlockTable& table, int64_t num_tokens) {
  const int64_t missing = BlocksFor(num_tokens) - static_cast<int64_t>(table.blocks.size());
  if (missing > num_free()) return false;
  for (int64_t i = 0; i < missing; ++i) table.blocks.push_back(Take());
  return true;
}

void BlockManager::CommitFullBlocks(BlockTable& table, std::span<const int32_t> tokens,
                                    int num_computed) {
  if (!prefix_caching_) return;
  for (; (table.num_committed + 1) * kBlockTokens <= num_computed; ++table.num_committed) {
    table.content = cache_.Insert(table.content,
                                  tokens.subspan(table.num_committed * kBlockTokens, kBlockTokens),
                                  table.blocks[table.num_committed]);
  }
}

void BlockManager::Release(BlockTable& table) {
  // Last block first: the ends of texts are reused before their beginnings, which more requests
  // may share and without which the ends cannot be found.
  for (auto it = table.blocks.rbegin(); it != table.blocks.rend(); ++it) Unref(*it);
  table.blocks.clear();
  table.num_committed = 0;
  table.content = kEmptyContent;
  table.version = ++last_version_;
}

int32_t BlockManager::Take() {
  int32_t block;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else {
    block = lru_oldest_;
    LruRemove(block);
    cache_.Erase(block);
  }
  blocks_[block].num_refs = 1;
  return block;
}

void BlockManager::Unref(int32_t block) {
  GLOAM_CHECK(blocks_[block].num_refs > 0);
  if (--blocks_[block].num_refs > 0) return;
  if (cache_.Contains(block)) {
    LruPushNewest(block);
  } else {
    free_.push_back(block);
  }
}

void BlockManager::LruPushNewest(int32_t block) {
  blocks_[block].prev = lru_newest_;
  blocks_[block].next = -1;
  blocks_[block].in_lru = true;
  if (lru_newest_ >= 0) {
    blocks_[lru_newest_].next = block;
  } else {
    lru_oldest_ = block;
  }
  lru_newest_ = block;
  ++num_cached_free_;
}

void BlockManager::LruRemove(int32_t block) {
  Block& entry = blocks_[block];
  GLOAM_CHECK(entry.in_lru);
  (entry.prev >= 0 ? blocks_[entry.prev].next : lru_oldest_) = entry.next;
  (entry.next >= 0 ? blocks_[entry.next].prev : lru_newest_) = entry.prev;
  entry.in_lru = false;
  --num_cached_free_;
}

Status BlockManager::CheckIntegrity(std::span<const BlockTable* const> tables) const {
  GLOAM_RETURN_IF_ERROR(cache_.CheckIntegrity());
  std::vector<int> num_refs(blocks_.size(), 0);
  for (const BlockTable* table : tables) {
    for (int32_t block : table->blocks) {
      if (block < 0 || block >= num_blocks()) return Internal("a table holds block {}", block);
      ++num_refs[block];
    }
    if (table->num_committed > static_cast<int>(table->blocks.size())) {
      return Internal("a table of {} blocks has {} committed", table->blocks.size(),
                      table->num_committed);
    }
  }

  std::vector<int> num_states(blocks_.size(), 0);
  for (int32_t block : free_) {
    ++num_states[block];
    if (cache_.Contains(block)) return Internal("block {} is cached and without contents", block);
  }
  int64_t lru_length = 0;
  for (int32_t block = lru_oldest_, prev = -1; block >= 0; block = blocks_[block].next) {
    if (++lru_length > num_blocks()) return Internal("the LRU list has a cycle");
    if (!blocks_[block].in_lru || blocks_[block].prev != prev) {
      return Internal("block {} is linked wrongly", block);
    }
    if (!cache_.Contains(block)) return Internal("block {} is in the LRU list uncached", block);
    ++num_states[block];
    prev = block;
  }
  if (lru_length != num_cached_free_) {
    return Internal("the LRU list has {} blocks, counted {}", lru_length, num_cached_free_);
  }
  for (int64_t block = 0; block < num_blocks(); ++block) {
    if (blocks_[block].num_refs != num_refs[block]) {
      return Internal("block {} counts {} references, the tables hold {}", block,
                      blocks_[block].num_refs, num_refs[block]);
    }
    if (num_states[block] + (num_refs[block] > 0 ? 1 : 0) != 1) {
      return Internal("block {} is in {} free lists with {} references", block, num_states[block],
                      num_refs[block]);
    }
  }
  return OkStatus();
}

}  // namespace gloam
