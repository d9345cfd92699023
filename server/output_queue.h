// OutputQueue: the bounded bridge from the engine thread to one client's connection. The engine
// pushes, the connection takes; deltas of one answer that wait are merged, so a slow reader costs
// the bytes of its text and no more. Past the bound the request is cancelled.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/request.h"

namespace gloam {

class OutputQueue : public OutputSink {
 public:
  // `on_ready` runs on the engine thread, under the queue's lock, when something arrives in an
  // empty queue; never again after Close(). It must only wake the reader (post, notify), not call
  // back. `max_bytes` bounds text, tokens and log-probabilities that wait; the end always gets
  // through.
  OutputQueue(size_t max_bytes, std::function<void()> on_ready);

  void OnPromptLogprobs(std::vector<SampleResult> logprobs) override;
  [[nodiscard]] bool OnDelta(OutputDelta delta) override;
  void OnEnd(const RequestSummary& summary) override;

  struct Batch {
    std::vector<SampleResult> prompt_logprobs;
    std::vector<OutputDelta> deltas;
    std::optional<RequestSummary> summary;  // set once, in the last batch
  };

  // Everything that waits. Any thread.
  Batch Take();

  // No more callbacks; later pushes are refused. Any thread.
  void Close();

 private:
  bool IsEmptyLocked() const;

  const size_t max_bytes_;
  std::mutex mutex_;
  std::function<void()> on_ready_;
  Batch pending_;
  size_t pending_bytes_ = 0;
  bool closed_ = false;
};

}  // namespace gloam
