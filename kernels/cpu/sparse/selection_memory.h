// SelectionMemory: what selectors remember from layer to layer within one step (TidalDecode's
// reuse). Owned by the CPU backend's Ops.
#pragma once

#include <span>
#include <vector>

#include "kernels/token_set.h"

namespace gloam::cpu {

class SelectionMemory {
 public:
  // Before the tasks of a layer: `num_slots` = tokens of the step * KV heads. A layer that does not
  // come after the last one begins a new step and forgets everything.
  void BeginLayer(int layer, size_t num_slots) {
    if (layer <= layer_) {
      for (std::vector<TokenMask>& slot : slots_) slot.clear();
    }
    layer_ = layer;
    if (slots_.size() < num_slots) slots_.resize(num_slots);
  }

  // Different slots may be used by different threads at a time.
  std::span<const TokenMask> Recall(size_t slot) const { return slots_[slot]; }
  void Remember(size_t slot, std::span<const TokenMask> masks) {
    slots_[slot].assign(masks.begin(), masks.end());
  }

 private:
  int layer_ = -1;
  std::vector<std::vector<TokenMask>> slots_;
};

}  // namespace gloam::cpu
