#include "engine/prefix_cache.h"

#include <algorithm>

#include "base/check.h"

namespace gloam {

PrefixCache::Key PrefixCache::MakeKey(ContentId parent, std::span<const int32_t> tokens) {
  GLOAM_CHECK(tokens.size() == kBlockTokens);
  Key key;
  key.parent = parent;
  std::copy(tokens.begin(), tokens.end(), key.tokens.begin());
  return key;
}

std::optional<PrefixCache::Entry> PrefixCache::Find(ContentId parent,
                                                    std::span<const int32_t> tokens) const {
  const auto it = entries_.find(MakeKey(parent, tokens));
  if (it == entries_.end()) return std::nullopt;
  return it->second;
}

ContentId PrefixCache::Insert(ContentId parent, std::span<const int32_t> tokens, int32_t block) {
  GLOAM_CHECK(!Contains(block));
  Key key = MakeKey(parent, tokens);
  const auto [it, inserted] = entries_.try_emplace(key);
  if (inserted) {
    it->second = {.block = block, .content = ++last_content_};
    key_of_block_[block] = key;
  }
  return it->second.content;
}

void PrefixCache::Erase(int32_t block) {
  GLOAM_CHECK(Contains(block));
  entries_.erase(*key_of_block_[block]);
  key_of_block_[block].reset();
}

Status PrefixCache::CheckIntegrity() const {
  int64_t num_keys = 0;
  for (size_t block = 0; block < key_of_block_.size(); ++block) {
    if (!key_of_block_[block]) continue;
    ++num_keys;
    const auto it = entries_.find(*key_of_block_[block]);
    if (it == entries_.end() || it->second.block != static_cast<int32_t>(block)) {
      return Internal("prefix cache: the key of block {} does not lead back to it", block);
    }
  }
  if (num_keys != num_blocks()) {
    return Internal("prefix cache: {} entries, but {} blocks with a key", num_blocks(), num_keys);
  }
  return OkStatus();
}

}  // namespace gloam
