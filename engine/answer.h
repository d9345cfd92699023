// Answer: one of a request's n answers. Holds its sequence, what sampling needs to know, and turns
// drawn tokens into output. Owned by EngineCore's request; engine thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/detokenizer.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "engine/stop_checker.h"
#include "kernels/sample.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

struct ActiveRequest;

class Answer {
 public:
  // `request` and `tokenizer` must outlive the answer. `max_new_tokens` >= 0.
  Answer(const Request& request, SequenceOrder order, uint64_t seed, int max_new_tokens,
         const Tokenizer& tokenizer);
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  Sequence& sequence() { return sequence_; }
  int num_generated() const { return sequence_.num_known() - sequence_.num_prompt_tokens; }

  // How the next token is to be drawn. Valid until the next Take.
  SampleRow MakeSampleRow() const;

  // False: the answer is to have no tokens at all; Finish it with kLength instead of sampling.
  bool MayGenerate() const { return max_new_tokens_ > 0; }

  // A token is being drawn in `row` of a sample: gives it its place in the sequence, so that the
  // next step can compute it. Take follows, unless the answer is finished before.
  void Expect(int row);
  // No token can follow the one that is expected next, whatever it is.
  bool NextIsLast() const { return num_generated() + 1 >= max_new_tokens_; }
  // Puts the expected token into its place. Deliver must follow before the next is expected.
  void Take(SampleResult result);
  // The taken token ends the answer by itself, so no step need compute it.
  bool taken_is_last() const { return taken_ && taken_->verdict.finish_reason.has_value(); }
  bool has_taken() const { return taken_.has_value(); }
  // Turns the taken token into output; may finish.
  void Deliver();

  // Ends the answer from outside.
  void Finish(FinishReason reason, Status error = OkStatus());
  bool finished() const { return finished_; }

  // Output to deliver. A token goes out together with the text that it completes; while a stop
  // string may be forming, or a character is incomplete, both wait.
  bool HasDelta() const { return finished_ ? !delta_taken_ : !delta_.text.empty(); }
  OutputDelta TakeDelta();
  FinishReason finish_reason() const { return finish_reason_; }

  // For latency metrics; kept by EngineCore.
  std::chrono::steady_clock::time_point last_token_time;
  ActiveRequest* active_request = nullptr;
  // Leading tokens that the account of sparsity has seen; kept by EngineCore.
  int num_counted_tokens = 0;

 private:
  // A token that is part of the sequence and not of the output yet.
  struct TakenToken {
    SampleResult result;
    int num_generated = 0;  // with it
    StopChecker::TokenVerdict verdict;
  };

  void CountToken(int32_t token);

  const Request& request_;
  const Tokenizer& tokenizer_;
  const uint64_t seed_;
  const int max_new_tokens_;
  Sequence sequence_;
  StopChecker stop_checker_;
  StreamingDetokenizer detokenizer_;

  // Kept only where a penalty needs them.
  const bool counts_output_;
  std::vector<int32_t> distinct_prompt_tokens_;
  std::vector<std::pair<int32_t, int32_t>> output_counts_;  // (token, occurrences)
  absl::flat_hash_map<int32_t, size_t> count_of_token_;     // index into output_counts_

  std::optional<TakenToken> taken_;
  OutputDelta delta_;
  bool finished_ = false;
  bool delta_taken_ = false;  // the last one
  FinishReason finish_reason_ = FinishReason::kStop;
};

}  // namespace gloam
