#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "catch2/catch.hpp"

namespace gloam::cpu {
namespace {

TEST_CASE("ParallelFor runs every task once and publishes its writes") {
  for (int num_threads : {1, 2, 3, 7}) {
    ThreadPool pool(num_threads);
    CHECK(pool.num_threads() == num_threads);
    for (int num_tasks : {0, 1, 2, 3, 64, 1000}) {
      CAPTURE(num_threads, num_tasks);
      std::vector<int> runs(num_tasks, 0);  // not atomic: TSan proves the hand-over
      std::atomic<bool> thread_in_range{true};
      pool.ParallelFor(num_tasks, [&](int64_t task, int thread) {
        if (thread < 0 || thread >= num_threads) thread_in_range = false;
        ++runs[task];
      });
      CHECK(thread_in_range);
      CHECK(runs == std::vector<int>(num_tasks, 1));
    }
  }
}

TEST_CASE("Many short regions in a row see each other's results") {
  ThreadPool pool(3);
  std::vector<int64_t> values(16, 0);
  for (int round = 0; round < 20000; ++round) {
    pool.ParallelFor(16, [&](int64_t task, int) { values[task] += task + round % 2; });
  }
  for (int64_t task = 0; task < 16; ++task) CHECK(values[task] == 20000 * task + 10000);
}

TEST_CASE("Threads without a task help inside the tasks of others") {
  ThreadPool pool(3);
  for (int round = 0; round < 200; ++round) {
    // Two tasks for three threads; each has loops inside, one after another.
    std::vector<std::vector<int>> runs(2, std::vector<int>(50, 0));
    pool.ParallelFor(2, [&](int64_t task, int thread) {
      for (int loop = 0; loop < 3; ++loop) {
        InnerLoop(pool, thread).For(50, [&](int64_t i, int) { ++runs[task][i]; });
      }
    });
    for (const std::vector<int>& of_task : runs) REQUIRE(of_task == std::vector<int>(50, 3));
  }
  // One task only has work: sooner or later another thread is seen at it.
  std::atomic<bool> helped{false};
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!helped && std::chrono::steady_clock::now() < give_up) {
    pool.ParallelFor(2, [&](int64_t task, int owner) {
      if (task == 1) return;
      InnerLoop(pool, owner).For(20, [&](int64_t, int thread) {
        if (thread != owner) helped = true;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      });
    });
  }
  CHECK(helped);
}

TEST_CASE("Pieces of an inner loop cover its range") {
  std::vector<int> seen(10, 0);
  InnerLoop().ForPieces(10, 4, [&](int64_t begin, int64_t end) {
    CHECK(end - begin <= 4);
    for (int64_t i = begin; i < end; ++i) ++seen[i];
  });
  CHECK(seen == std::vector<int>(10, 1));
}

TEST_CASE("Workers that went to sleep wake up for the next region") {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // longer than workers spin
    // Tasks that meet each other: this ends only if three threads run them.
    std::atomic<int> arrived{0};
    pool.ParallelFor(3, [&](int64_t, int) {
      ++arrived;
      while (arrived < 3) std::this_thread::yield();
    });
    CHECK(arrived == 3);
  }
}

TEST_CASE("A pool may be driven by different threads one after another") {
  ThreadPool pool(2);
  std::atomic<int> sum{0};
  for (int i = 0; i < 10; ++i) {
    std::thread([&] { pool.ParallelFor(10, [&](int64_t task, int) { sum += task; }); }).join();
  }
  CHECK(sum == 450);
}

}  // namespace
}  // namespace gloam::cpu
