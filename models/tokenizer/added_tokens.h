// AddedTokens: tokens that are found in the text before anything else happens to it: control
// tokens where the text's origin allows them, user-defined tokens everywhere. Immutable; any
// thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace gloam {

struct AddedToken {
  int32_t id = 0;
  std::string content;       // not empty
  bool special = false;      // found only where special tokens are allowed
  bool single_word = false;  // not next to a word character
  bool lstrip = false;       // takes the white space to its left along
  bool rstrip = false;       // the same to its right
};

class AddedTokens {
 public:
  // A stretch of the text: one added token, or (id < 0) plain text.
  struct Piece {
    int32_t id = -1;
    size_t begin = 0, end = 0;
  };

  explicit AddedTokens(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }

  // Cuts `text` into pieces, leftmost and longest token first, as Hugging Face's tokenizers do.
  // A special token must lie inside one of the `allowed` stretches, which are sorted and disjoint.
  struct Range {
    size_t begin = 0, end = 0;
  };
  std::vector<Piece> Split(std::string_view text, const std::vector<Range>& allowed) const;

 private:
  // Index of the longest token that begins at `pos` and is allowed there, or -1. `special_end` is
  // where the allowed stretch around `pos` ends (`pos` where there is none).
  int LongestAt(std::string_view text, size_t pos, size_t special_end) const;

  std::vector<AddedToken> tokens_;
  // A trie: (node << 8 | byte) -> child. Node 0 is the root.
  absl::flat_hash_map<uint64_t, uint32_t> children_;
  std::vector<int32_t> token_at_;  // per node: index in tokens_ or -1
  bool first_byte_[256] = {};
};

}  // namespace gloam
