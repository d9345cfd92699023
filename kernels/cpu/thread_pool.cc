#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace gloam::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How long a worker looks for the next piece before it sleeps. The gaps inside a forward pass are
// a few microseconds; a sleeping worker costs its waker a system call and itself 20-50 us.
constexpr auto kSpinTime = std::chrono::microseconds(150);
// After this part of it, other threads may have the core between two looks.
constexpr auto kPoliteAfter = std::chrono::microseconds(20);
constexpr int kLooksPerRound = 32;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()`; returns false when `limit` passed first.
template <typename Done>
bool SpinUntil(const Done& done, Clock::duration limit) {
  Clock::time_point start;
  for (bool first_round = true;; first_round = false) {
    for (int i = 0; i < kLooksPerRound; ++i) {
      if (done()) return true;
      Pause();
    }
    const Clock::time_point now = Clock::now();
    if (first_round) start = now;
    if (now - start >= limit) return false;
    if (now - start >= kPoliteAfter) std::this_thread::yield();
  }
}

// One word says all about a job: how many workers are inside it, whether more may enter, and (of
// those that wake sleepers) its number. A worker that wakes late finds the job closed and is not
// waited for.
constexpr uint64_t kWorkerMask = 0xffff;
constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr uint64_t kNextJob = uint64_t{1} << 17;

uint64_t JobOf(uint64_t state) { return state / kNextJob; }

}  // namespace

struct ThreadPool::Impl {
  // Tasks that threads take one by one, from the first on or from the last on. The task and the
  // count are written while the job is closed and empty, read by threads inside it.
  struct Job {
    alignas(64) std::atomic<uint64_t> state{0};
    // Tasks from the first on, one each, and from the last on, kFromLast each.
    alignas(64) std::atomic<uint64_t> taken{0};
    alignas(64) const TaskRef* task = nullptr;
    int64_t num_tasks = 0;

    static constexpr uint64_t kFromFirst = 1;
    static constexpr uint64_t kFromLast = uint64_t{1} << 32;

    void Set(const TaskRef& f, int64_t count) {
      GLOAM_CHECK(count < std::numeric_limits<int32_t>::max());
      task = &f;
      num_tasks = count;
      taken.store(0, std::memory_order_relaxed);
    }
    void RunTasks(int thread, uint64_t side) {
      for (;;) {
        const uint64_t before = taken.fetch_add(side, std::memory_order_relaxed);
        const auto from_first = static_cast<int64_t>(before % kFromLast);
        const auto from_last = static_cast<int64_t>(before / kFromLast);
        if (from_first + from_last >= num_tasks) return;
        (*task)(side == kFromFirst ? from_first : num_tasks - 1 - from_last, thread);
      }
    }
    bool IsEmpty() const { return (state.load(std::memory_order_acquire) & kWorkerMask) == 0; }
  };
  Job job;
  std::vector<Job> inner_jobs;  // loops inside tasks, by the thread that runs the task
  alignas(64) std::atomic<int> num_inner_jobs{0};

  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<int> num_sleepers{0};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;

  // For a thread without a task: works on the inner loops of the others.
  void HelpInside(int thread) {
    if (num_inner_jobs.load(std::memory_order_relaxed) == 0) return;
    for (Job& inner : inner_jobs) {
      uint64_t seen = inner.state.load(std::memory_order_relaxed);
      if ((seen & kOpen) == 0) continue;
      if (!inner.state.compare_exchange_strong(seen, seen + 1, std::memory_order_acquire)) continue;
      // The owner begins at the other end: in loop after loop each meets the data that it has had.
      inner.RunTasks(thread, Job::kFromLast);
      inner.state.fetch_sub(1, std::memory_order_release);
    }
  }

  void WorkerLoop(int thread) {
    uint64_t last_job = 0;
    const auto has_news = [&] {
      const uint64_t now = job.state.load(std::memory_order_seq_cst);
      return ((now & kOpen) != 0 && JobOf(now) != last_job) || stopping.load();
    };
    const auto has_news_or_helps = [&] {
      HelpInside(thread);
      return has_news();
    };
    for (;;) {
      if (!SpinUntil(has_news_or_helps, kSpinTime)) {
        std::unique_lock lock(mutex);
        num_sleepers.fetch_add(1);
        wake.wait(lock, has_news);
        num_sleepers.fetch_sub(1);
      }
      if (stopping.load()) return;
      uint64_t seen = job.state.load(std::memory_order_acquire);
      if ((seen & kOpen) == 0 || !job.state.compare_exchange_strong(seen, seen + 1)) continue;
      last_job = JobOf(seen);
      job.RunTasks(thread, Job::kFromFirst);
      job.state.fetch_sub(1, std::memory_order_release);
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>()) {
  GLOAM_CHECK(num_threads >= 1 && num_threads < static_cast<int>(kWorkerMask));
  impl_->inner_jobs = std::vector<Impl::Job>(static_cast<size_t>(num_threads));
  for (int thread = 1; thread < num_threads; ++thread) {
    impl_->workers.emplace_back([impl = impl_.get(), thread] { impl->WorkerLoop(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(impl_->mutex);
    impl_->stopping.store(true);
  }
  impl_->wake.notify_all();
  for (std::thread& worker : impl_->workers) worker.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(impl_->workers.size()) + 1; }

void ThreadPool::ParallelFor(int64_t num_tasks, TaskRef f) {
  if (num_tasks <= 1 || impl_->workers.empty()) {
    for (int64_t i = 0; i < num_tasks; ++i) f(i, 0);
    return;
  }
  Impl& impl = *impl_;
  impl.job.Set(f, num_tasks);
  // seq_cst here and on num_sleepers: either this thread sees the sleeper, or it sees the job.
  impl.job.state.fetch_add(kNextJob | kOpen, std::memory_order_seq_cst);
  if (impl.num_sleepers.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard lock(impl.mutex); }
    impl.wake.notify_all();
  }
  impl.job.RunTasks(0, Impl::Job::kFromFirst);
  impl.job.state.fetch_and(~kOpen, std::memory_order_acq_rel);
  SpinUntil(
      [&] {
        impl.HelpInside(0);
        return impl.job.IsEmpty();
      },
      Clock::duration::max());
}

void ThreadPool::ParallelForInside(int thread, int64_t num_tasks, TaskRef f) {
  if (num_tasks <= 1 || impl_->workers.empty()) {
    for (int64_t i = 0; i < num_tasks; ++i) f(i, thread);
    return;
  }
  Impl::Job& job = impl_->inner_jobs[thread];
  job.Set(f, num_tasks);
  job.state.fetch_add(kOpen, std::memory_order_release);
  impl_->num_inner_jobs.fetch_add(1, std::memory_order_relaxed);
  job.RunTasks(thread, Impl::Job::kFromFirst);
  impl_->num_inner_jobs.fetch_sub(1, std::memory_order_relaxed);
  job.state.fetch_sub(kOpen, std::memory_order_acq_rel);
  SpinUntil([&] { return job.IsEmpty(); }, Clock::duration::max());
}

}  // namespace gloam::cpu
