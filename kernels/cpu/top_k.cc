#include "kernels/cpu/top_k.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/token_scan.h"

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
  // Sixteen blocks are to this search what sixteen tokens are to the other.
  thread_local std::vector<TokenMask> groups;
  groups.assign(static_cast<size_t>((num_blocks + 15) / 16), 0);
  for (int64_t i = 0; i < num_blocks; ++i) {
    if (masks[i] != 0) groups[i / 16] |= static_cast<TokenMask>(1 << i % 16);
  }
  KeepTopTokens(scores, count, static_cast<int64_t>(groups.size()), groups.data());
  for (int64_t i = 0; i < num_blocks; ++i) {
    if ((groups[i / 16] >> i % 16 & 1) == 0) masks[i] = kNoTokens;
  }
}

}  // namespace gloam::cpu
