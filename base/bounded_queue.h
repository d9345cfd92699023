// A mutex-guarded FIFO with a fixed capacity: the only way from server threads to the engine.
// Push never blocks (it refuses when full), so a client cannot hold a server thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <utility>

namespace gloam {

template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  // False when `capacity` items wait already; `item` is untouched then. Any thread.
  [[nodiscard]] bool TryPush(T&& item) {
    {
      std::lock_guard lock(mutex_);
      if (items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    ready_.notify_one();
    return true;
  }

  // Takes everything queued, in order, without waiting. Any thread.
  std::deque<T> TakeAll() {
    std::lock_guard lock(mutex_);
    return std::exchange(items_, {});
  }

  // Waits until an item is queued, Wake() was called or `timeout` passed, then takes everything.
  template <typename Rep, typename Period>
  std::deque<T> WaitAndTakeAll(std::chrono::duration<Rep, Period> timeout) {
    std::unique_lock lock(mutex_);
    ready_.wait_for(lock, timeout, [this] { return !items_.empty() || woken_; });
    woken_ = false;
    return std::exchange(items_, {});
  }

  // Ends one WaitAndTakeAll early. Any thread.
  void Wake() {
    {
      std::lock_guard lock(mutex_);
      woken_ = true;
    }
    ready_.notify_one();
  }

 private:
  const size_t capacity_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<T> items_;
  bool woken_ = false;
};

}  // namespace gloam
