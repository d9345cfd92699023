#include "server/output_queue.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace gloam {
namespace {

// What a waiting delta holds in memory, near enough for a bound.
size_t BytesOf(const OutputDelta& delta) {
  size_t bytes = delta.text.size() + delta.tokens.size() * sizeof(int32_t);
  for (const SampleResult& result : delta.logprobs) {
    bytes += sizeof(SampleResult) + result.top.size() * sizeof(TokenLogprob);
  }
  return bytes;
}

void MergeInto(OutputDelta& waiting, OutputDelta&& delta) {
  waiting.text += delta.text;
  waiting.tokens.insert(waiting.tokens.end(), delta.tokens.begin(), delta.tokens.end());
  waiting.logprobs.insert(waiting.logprobs.end(), std::make_move_iterator(delta.logprobs.begin()),
                          std::make_move_iterator(delta.logprobs.end()));
  if (delta.finish_reason) waiting.finish_reason = delta.finish_reason;
  if (delta.stop_reason) waiting.stop_reason = std::move(delta.stop_reason);
  if (!delta.error.ok()) waiting.error = std::move(delta.error);
}

}  // namespace

OutputQueue::OutputQueue(size_t max_bytes, std::function<void()> on_ready)
    : max_bytes_(max_bytes), on_ready_(std::move(on_ready)) {}

bool OutputQueue::IsEmptyLocked() const {
  return pending_.deltas.empty() && pending_.prompt_logprobs.empty() && !pending_.summary;
}

void OutputQueue::OnPromptLogprobs(std::vector<SampleResult> logprobs) {
  std::lock_guard lock(mutex_);
  if (closed_ || logprobs.empty()) return;
  const bool was_empty = IsEmptyLocked();
  pending_.prompt_logprobs = std::move(logprobs);  // bounded by the context's length
  if (was_empty) on_ready_();
}

bool OutputQueue::OnDelta(OutputDelta delta) {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  const size_t bytes = BytesOf(delta);
  const bool fits = pending_bytes_ + bytes <= max_bytes_;
  if (!fits) {
    // The reader must learn that its answer ended early: text that no longer fits is lost.
    if (!delta.finish_reason) return false;
    if (delta.finish_reason != FinishReason::kError) delta.finish_reason = FinishReason::kCancelled;
    delta.text.clear();
    delta.tokens.clear();
    delta.logprobs.clear();
  } else {
    pending_bytes_ += bytes;
  }
  const bool was_empty = IsEmptyLocked();
  const auto waiting = std::find_if(pending_.deltas.begin(), pending_.deltas.end(),
                                    [&](const OutputDelta& d) { return d.index == delta.index; });
  if (waiting == pending_.deltas.end()) {
    pending_.deltas.push_back(std::move(delta));
  } else {
    MergeInto(*waiting, std::move(delta));
  }
  if (was_empty) on_ready_();
  return fits;
}

void OutputQueue::OnEnd(const RequestSummary& summary) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  const bool was_empty = IsEmptyLocked();
  pending_.summary = summary;
  if (was_empty) on_ready_();
}

OutputQueue::Batch OutputQueue::Take() {
  std::lock_guard lock(mutex_);
  pending_bytes_ = 0;
  return std::exchange(pending_, {});
}

void OutputQueue::Close() {
  std::function<void()> released;  // destroyed outside the lock: it may own the connection
  std::lock_guard lock(mutex_);
  closed_ = true;
  released = std::exchange(on_ready_, nullptr);
  pending_ = {};
  pending_bytes_ = 0;
}

}  // namespace gloam
