#include "kernels/cpu/sparse/top_k.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/sparse/token_scan.h"

namespace gloam::cpu {

void KeepTopTokens(const float* scores, int64_t count, int64_t num_blocks, TokenMask* masks) {
  const int64_t num_tokens = CountOf(masks, num_blocks);
  if (count >= num_tokens) return;
  if (count <= 0) {
    std::fill_n(masks, num_blocks, kNoTokens);
    return;
  }
  KeyBuffers& buffers = ThreadKeyBuffers(num_tokens);
  const KeyRange keys = GatherKeys(scores, masks, num_blocks, buffers);
  const Cut cut = CutByCount(buffers, keys, count);
  KeepFromCut(scores, cut.key, count - static_cast<int64_t>(cut.above), num_blocks, masks);
}

void KeepTopBlocks(const float* scores, int64_t count, int64_t num_blocks, TokenMask* masks) {
  thread_local std::vector<TokenMask> groups;
  groups.resize(static_cast<size_t>((num_blocks + 15) / 16));
  GroupBlocks(masks, num_blocks, groups.data());
  KeepTopTokens(scores, count, static_cast<int64_t>(groups.size()), groups.data());
  KeepGroupedBlocks(groups.data(), num_blocks, masks);
}

}  // namespace gloam::cpu
