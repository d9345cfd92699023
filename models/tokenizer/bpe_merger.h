// BpeMerger: joins the symbols of a word by the model's ranked merges, lowest rank first, leftmost
// among equals, in n log n. Immutable once the merges are in; Scratch belongs to one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace gloam {

class BpeMerger {
 public:
  // Working memory, kept between words.
  struct Scratch {
    struct Node {
      int32_t id, previous, next;  // `next` of the last is the number of symbols
      uint32_t rank;               // of the pair (this, next)
      int32_t merged;              // what that pair becomes
    };
    std::vector<Node> nodes;
    std::vector<uint64_t> heap;  // rank << 32 | position of the left symbol
  };

  void Reserve(size_t num_merges) { merges_.reserve(num_merges); }

  // The pair (left, right) becomes `merged`. The first rank given for a pair holds.
  void Add(int32_t left, int32_t right, int32_t merged, uint32_t rank) {
    merges_.try_emplace(Key(left, right), Merge{rank, merged});
  }

  // Merges `symbols` in place.
  void Run(std::vector<int32_t>* symbols, Scratch* scratch) const;

 private:
  struct Merge {
    uint32_t rank;
    int32_t merged;
  };
  static uint64_t Key(int32_t left, int32_t right) {
    return (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
  }
  void LookUp(int32_t position, Scratch* scratch) const;

  absl::flat_hash_map<uint64_t, Merge> merges_;
};

}  // namespace gloam
