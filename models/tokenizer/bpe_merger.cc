#include "models/tokenizer/bpe_merger.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace gloam {
namespace {

constexpr uint32_t kNoMerge = std::numeric_limits<uint32_t>::max();

}  // namespace

// Sets the rank of the pair that begins at `position` and queues it.
void BpeMerger::LookUp(int32_t position, Scratch* scratch) const {
  auto& node = scratch->nodes[position];
  node.rank = kNoMerge;
  if (node.next == static_cast<int32_t>(scratch->nodes.size())) return;
  const auto it = merges_.find(Key(node.id, scratch->nodes[node.next].id));
  if (it == merges_.end()) return;
  node.rank = it->second.rank;
  node.merged = it->second.merged;
  scratch->heap.push_back((uint64_t{node.rank} << 32) | static_cast<uint32_t>(position));
}

void BpeMerger::Run(std::vector<int32_t>* symbols, Scratch* scratch) const {
  const int32_t n = static_cast<int32_t>(symbols->size());
  if (n < 2) return;
  auto& nodes = scratch->nodes;
  auto& heap = scratch->heap;
  nodes.resize(n);
  heap.clear();
  for (int32_t i = 0; i < n; ++i) nodes[i] = {(*symbols)[i], i - 1, i + 1, kNoMerge, 0};
  for (int32_t i = 0; i < n; ++i) LookUp(i, scratch);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  const auto requeue = [&](int32_t position) {
    const size_t before = heap.size();
    LookUp(position, scratch);
    if (heap.size() != before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t top = heap.back();
    heap.pop_back();
    const auto position = static_cast<int32_t>(top & 0xFFFFFFFFu);
    auto& left = nodes[position];
    // A rank belongs to one pair, so a node that still has it still begins that pair.
    if (left.rank != static_cast<uint32_t>(top >> 32)) continue;
    auto& right = nodes[left.next];
    left.id = left.merged;
    left.next = right.next;
    right.rank = kNoMerge;
    if (left.next < n) nodes[left.next].previous = position;
    requeue(position);
    if (left.previous >= 0) requeue(left.previous);
  }
  symbols->clear();
  for (int32_t i = 0; i < n; i = nodes[i].next) symbols->push_back(nodes[i].id);
}

}  // namespace gloam
