// Which of several ranges, one after another, has a position: sequences of tokens, places of
// blocks.
#pragma once

#include <cstdint>

namespace gloam::cuda {

// The last i below num_ranges with begins[i] <= at; begins ascend, begins[0] <= at.
__device__ inline int FindRange(const int32_t* begins, int num_ranges, int at) {
  int low = 0, high = num_ranges - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (begins[middle] <= at) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace gloam::cuda
