// RunningGeneration: one API request while the engine works on it: an engine request and an
// OutputQueue for each prompt, seen as one stream of answers. Owned by the connection; the
// destructor cancels what still runs. AnswerCollector: gathers that stream into whole answers,
// for responses that are not streamed.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/generation_service.h"
#include "server/output_queue.h"

namespace gloam {

class RunningGeneration {
 public:
  // Submits every prompt's request. `on_ready` is called as OutputQueue says: from the engine
  // thread, under a lock, only to wake the reader. `max_bytes` bounds what waits for the reader,
  // all prompts together. Errors (nothing runs then) carry `param` and `code`: queue full is
  // kResourceExhausted with server_is_overloaded, draining is kUnavailable.
  [[nodiscard]] static StatusOr<std::unique_ptr<RunningGeneration>> Start(
      Engine& engine, PreparedGeneration prepared, size_t max_bytes,
      std::function<void()> on_ready);
  ~RunningGeneration();

  RunningGeneration(const RunningGeneration&) = delete;
  RunningGeneration& operator=(const RunningGeneration&) = delete;

  struct PromptLogprobs {
    int prompt = 0;
    std::vector<SampleResult> logprobs;
  };
  struct Batch {
    std::vector<PromptLogprobs> prompt_logprobs;  // before the prompt's first delta
    std::vector<OutputDelta> deltas;  // index over all answers: prompt * requests[0].n + answer
    bool done = false;                // nothing follows; summary() is complete
  };

  // Everything that waits, never waits itself. One reader at a time.
  Batch Take();

  // Frees the engine's blocks within a step; no more callbacks. Any thread, more than once.
  void Cancel();

  const PreparedGeneration& prepared() const { return prepared_; }  // `requests` were moved from
  int num_prompts() const { return static_cast<int>(queues_.size()); }
  int answers_per_prompt() const { return answers_per_prompt_; }
  const RequestSummary& summary() const { return summary_; }  // summed over the prompts
  // The prompt's token ids; kept only with echo and log-probabilities.
  const std::vector<int32_t>& prompt_tokens(int prompt) const { return prompt_tokens_[prompt]; }

 private:
  RunningGeneration(Engine& engine, PreparedGeneration prepared);

  Engine& engine_;
  PreparedGeneration prepared_;
  int answers_per_prompt_;
  std::vector<std::shared_ptr<OutputQueue>> queues_;  // one per prompt
  std::vector<RequestHandle> handles_;
  std::vector<std::vector<int32_t>> prompt_tokens_;
  int num_ended_ = 0;
  std::atomic<bool> cancelled_ = false;
  RequestSummary summary_;
};

// One whole answer.
struct Answer {
  int prompt = 0;
  int index = 0;  // among all choices of the response
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<SampleResult> logprobs;
  FinishReason finish_reason = FinishReason::kStop;
  std::optional<std::string> stop_reason;
};

class AnswerCollector {
 public:
  explicit AnswerCollector(const RunningGeneration& running);

  // Adds a batch. Errors: that of the first answer that failed (kError), or kCancelled.
  [[nodiscard]] Status Add(RunningGeneration::Batch batch);

  // The choices in order, after a batch with `done`: of each prompt's answers the
  // num_choices_per_prompt with the highest mean log-probability when best_of is larger than n.
  std::vector<Answer> TakeAnswers();

  // Log-probabilities of each prompt's tokens; empty vectors where none were asked for.
  std::vector<std::vector<SampleResult>> TakePromptLogprobs() {
    return std::move(prompt_logprobs_);
  }

 private:
  int num_choices_per_prompt_;
  int answers_per_prompt_;
  bool prompt_only_;
  int num_logprobs_;
  std::vector<Answer> answers_;  // [num_prompts * answers_per_prompt]
  std::vector<std::vector<SampleResult>> prompt_logprobs_;
};

// Error for an answer that did not end well; OK for kStop and kLength.
Status StatusOfEnd(const OutputDelta& delta);

}  // namespace gloam
