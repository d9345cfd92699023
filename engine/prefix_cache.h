// PrefixCache: which full blocks hold which text. A key is the block's 16 tokens and the content
// before it, compared exactly (no hash stands in for contents), so two texts can never share by
// accident or by a crafted collision. Owned by BlockManager; engine thread only; no device code.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"
#include "kernels/paged_kv.h"

namespace gloam {

// Names a whole text that ends at a block's edge: equal ids mean equal tokens from the start.
// Never reused within a process; 0 is the empty text.
using ContentId = uint64_t;
inline constexpr ContentId kEmptyContent = 0;

class PrefixCache {
 public:
  struct Entry {
    int32_t block = -1;
    ContentId content = kEmptyContent;
  };

  explicit PrefixCache(int64_t num_blocks) : key_of_block_(num_blocks) {}

  // The block that holds `tokens` after the text `parent`, if any. `tokens` are kBlockTokens.
  std::optional<Entry> Find(ContentId parent, std::span<const int32_t> tokens) const;

  // Remembers that `block` holds `tokens` after `parent`. When another block holds the same text
  // already, that one stays and `block` is not entered. Returns the text's id in both cases.
  ContentId Insert(ContentId parent, std::span<const int32_t> tokens, int32_t block);

  // Forgets a block that is about to be overwritten; it must be in the cache.
  void Erase(int32_t block);

  bool Contains(int32_t block) const { return key_of_block_[block].has_value(); }
  int64_t num_blocks() const { return static_cast<int64_t>(entries_.size()); }

  // Errors: kInternal saying what is inconsistent.
  [[nodiscard]] Status CheckIntegrity() const;

 private:
  struct Key {
    ContentId parent = kEmptyContent;
    std::array<int32_t, kBlockTokens> tokens = {};

    friend bool operator==(const Key&, const Key&) = default;
    template <typename H>
    friend H AbslHashValue(H state, const Key& key) {
      return H::combine(std::move(state), key.parent, key.tokens);
    }
  };
  static Key MakeKey(ContentId parent, std::span<const int32_t> tokens);

  absl::flat_hash_map<Key, Entry> entries_;       // absl seeds its hash per process
  std::vector<std::optional<Key>> key_of_block_;  // [num_blocks]
  ContentId last_content_ = kEmptyContent;
};

}  // namespace gloam
