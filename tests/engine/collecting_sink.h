// An OutputSink that keeps everything and can be waited for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine/request.h"

namespace gloam::testing {

class CollectingSink : public OutputSink {
 public:
  struct Output {
    std::string text;
    std::vector<int32_t> tokens;
    std::vector<SampleResult> logprobs;
    std::optional<FinishReason> finish_reason;
    std::optional<std::string> stop_reason;
    Status error;
    std::vector<std::string> pieces;  // the text of each delta
  };

  // Refuses every delta after the first `max_deltas`.
  explicit CollectingSink(int n = 1, int max_deltas = std::numeric_limits<int>::max())
      : outputs_(n), max_deltas_(max_deltas) {}

  void OnPromptLogprobs(std::vector<SampleResult> logprobs) override {
    std::lock_guard lock(mutex_);
    GLOAM_CHECK(num_deltas_ == 0 && !summary_ && prompt_logprobs_.empty());
    prompt_logprobs_ = std::move(logprobs);
  }

  bool OnDelta(OutputDelta delta) override {
    std::lock_guard lock(mutex_);
    GLOAM_CHECK(!summary_);
    if (++num_deltas_ > max_deltas_) return false;
    Output& output = outputs_.at(delta.index);
    GLOAM_CHECK(!output.finish_reason);
    output.text += delta.text;
    output.pieces.push_back(delta.text);
    output.tokens.insert(output.tokens.end(), delta.tokens.begin(), delta.tokens.end());
    for (SampleResult& logprob : delta.logprobs) output.logprobs.push_back(std::move(logprob));
    output.finish_reason = delta.finish_reason;
    output.stop_reason = delta.stop_reason;
    output.error = delta.error;
    changed_.notify_all();
    return true;
  }

  void OnEnd(const RequestSummary& summary) override {
    std::lock_guard lock(mutex_);
    GLOAM_CHECK(!summary_);  // exactly one
    summary_ = summary;
    changed_.notify_all();
  }

  // Waits for OnEnd; a minute without it ends the test program.
  RequestSummary Wait() {
    WaitUntil([this] { return summary_.has_value(); });
    return *summary_;
  }

  // Waits until `num_deltas` have come or the request has ended.
  void WaitForDeltas(int num_deltas) {
    WaitUntil([this, num_deltas] { return summary_ || num_deltas_ >= num_deltas; });
  }

  // After Wait().
  const Output& output(int index = 0) const { return outputs_.at(index); }
  const std::vector<SampleResult>& prompt_logprobs() const { return prompt_logprobs_; }

  bool ended() {
    std::lock_guard lock(mutex_);
    return summary_.has_value();
  }

 private:
  template <typename Condition>
  void WaitUntil(Condition condition) {
    std::unique_lock lock(mutex_);
    GLOAM_CHECK(changed_.wait_for(lock, std::chrono::seconds(60), condition));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Output> outputs_;
  std::vector<SampleResult> prompt_logprobs_;
  std::optional<RequestSummary> summary_;
  const int max_deltas_;
  int num_deltas_ = 0;
};

}  // namespace gloam::testing
