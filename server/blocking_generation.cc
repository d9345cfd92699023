#include "server/blocking_generation.h"

#include <condition_variable>
#include <mutex>
#include <utility>

namespace gloam {
namespace {

constexpr size_t kMaxQueuedBytes = 64 << 20;  // the caller reads as fast as it can

struct Wakeup {
  std::mutex mutex;
  std::condition_variable changed;
  bool ready = false;

  void Set() {
    std::lock_guard lock(mutex);
    ready = true;
    changed.notify_one();
  }
  void Wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return std::exchange(ready, false); });
  }
};

}  // namespace

StatusOr<RequestSummary> RunBlocking(Engine& engine, PreparedGeneration prepared,
                                     const std::function<bool(const OutputDelta&)>& on_delta) {
  Wakeup wakeup;  // outlives `running`, whose end stops the callbacks
  GLOAM_ASSIGN_OR_RETURN(const auto running,
                         RunningGeneration::Start(engine, std::move(prepared), kMaxQueuedBytes,
                                                  [&wakeup] { wakeup.Set(); }));
  for (;;) {
    wakeup.Wait();
    const RunningGeneration::Batch batch = running->Take();
    for (const OutputDelta& delta : batch.deltas) {
      GLOAM_RETURN_IF_ERROR(StatusOfEnd(delta));
      if (!on_delta(delta)) return running->summary();
    }
    if (batch.done) return running->summary();
  }
}

}  // namespace gloam
