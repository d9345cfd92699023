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

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace gloam::cpu
