// The rate at which loops that do nothing else read memory.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/memory.h"

namespace gloam::cpu {
namespace {

uint64_t Sum(const std::byte* data, size_t bytes) {
  std::array<uint64_t, 16> sums = {};
  for (size_t at = 0; at + sizeof(sums) <= bytes; at += sizeof(sums)) {
    for (size_t i = 0; i < sums.size(); ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + i * sizeof(word), sizeof(word));
      sums[i] += word;
    }
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double MeasureReadRate(ThreadPool& pool) {
  constexpr size_t kBytes = size_t{1} << 30;
  constexpr size_t kTaskBytes = size_t{4} << 20;
  constexpr int64_t kTasks = kBytes / kTaskBytes;
  constexpr int kRuns = 3;
  StatusOr<Buffer> memory = AllocateBuffer(kBytes);
  if (!memory.ok()) return 0;
  auto* data = static_cast<std::byte*>(memory->data());
  pool.ParallelFor(
      kTasks, [&](int64_t task, int) { std::memset(data + task * kTaskBytes, 1, kTaskBytes); });
  double best = 0;
  volatile uint64_t kept = 0;  // so that the loops stay
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    pool.ParallelFor(kTasks,
                     [&](int64_t task, int) { kept = Sum(data + task * kTaskBytes, kTaskBytes); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, kBytes / seconds.count());
  }
  return best;
}

}  // namespace gloam::cpu
