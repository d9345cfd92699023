// ThreadPool: the CPU backend's workers. The calling thread is worker 0; the others spin briefly
// between pieces of a forward pass (a wake-up through the kernel costs more than a small matrix
// product) and sleep when none comes.
#pragma once

#include <cstdint>
#include <memory>

namespace gloam::cpu {

// A non-owning reference to a callable void(int64_t task, int thread).
class TaskRef {
 public:
  template <typename F>
  TaskRef(const F& f)  // NOLINT: implicit, as a parameter type
      : object_(&f), call_([](const void* object, int64_t task, int thread) {
          (*static_cast<const F*>(object))(task, thread);
        }) {}
  void operator()(int64_t task, int thread) const { call_(object_, task, thread); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int);
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // >= 1, the caller included
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Runs f(task, thread) for every task in [0, num_tasks) and returns when all are done. Tasks are
  // taken dynamically, `thread` is in [0, num_threads). One caller at a time; not re-entrant.
  void ParallelFor(int64_t num_tasks, TaskRef f);

  // The same from inside a task of ParallelFor that runs on `thread`: threads that have no task
  // left help. Not from inside itself.
  void ParallelForInside(int thread, int64_t num_tasks, TaskRef f);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A loop inside a task: over the pool's idle threads, or on the calling thread alone.
class InnerLoop {
 public:
  InnerLoop() = default;
  InnerLoop(ThreadPool& pool, int thread) : pool_(&pool), thread_(thread) {}

  void For(int64_t num_tasks, TaskRef f) const {
    if (pool_ != nullptr) return pool_->ParallelForInside(thread_, num_tasks, f);
    for (int64_t i = 0; i < num_tasks; ++i) f(i, 0);
  }

  // Calls f(begin, end) for pieces of [0, count) of `size` or less.
  template <typename F>
  void ForPieces(int64_t count, int64_t size, const F& f) const {
    For((count + size - 1) / size, [&](int64_t piece, int /*thread*/) {
      f(piece * size, piece * size + size < count ? piece * size + size : count);
    });
  }

 private:
  ThreadPool* pool_ = nullptr;
  int thread_ = 0;
};

}  // namespace gloam::cpu
