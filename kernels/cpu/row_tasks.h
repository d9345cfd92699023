// ForRows: splits a row-wise operation over the pool, or runs it on the calling thread when it is
// too small to be worth a second one (a parallel region costs about a microsecond).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/thread_pool.h"

namespace gloam::cpu {

// Calls f(begin, end) for ranges that cover [0, num_rows). A task gets at least `grain_elements`
// elements; rows are never split, so the ranges do not influence results.
template <typename F>
void ForRows(ThreadPool& pool, int64_t num_rows, int64_t row_elements, int64_t grain_elements,
             const F& f) {
  if (num_rows == 0) return;
  const int64_t num_threads = pool.num_threads();
  const int64_t by_grain = num_rows * row_elements / grain_elements;
  if (num_threads == 1 || num_rows == 1 || by_grain < 2) {
    f(int64_t{0}, num_rows);
    return;
  }
  // Four tasks a thread even out the threads' speeds.
  const int64_t num_tasks = std::min({by_grain, num_rows, 4 * num_threads});
  pool.ParallelFor(num_tasks, [&](int64_t task, int) {
    f(num_rows * task / num_tasks, num_rows * (task + 1) / num_tasks);
  });
}

}  // namespace gloam::cpu
