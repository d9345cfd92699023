// EngineCore: the engine without its thread: requests in, steps, output to sinks. Owned by the
// engine (engine/engine.cc), whose thread makes every call but stats().
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"
#include "engine/answer.h"
#include "engine/engine.h"
#include "engine/kv_cache_pool.h"
#include "engine/metrics.h"
#include "engine/model_runner.h"
#include "engine/scheduler.h"
#include "engine/sparsity.h"

namespace gloam {

// An accepted request until its OnEnd.
struct ActiveRequest {
  RequestHandle handle = 0;
  Request request;
  std::shared_ptr<OutputSink> sink;
  std::chrono::steady_clock::time_point submit_time;
  std::vector<std::unique_ptr<Answer>> answers;  // [request.n]
  int num_unfinished = 0;
  bool started = false;      // part of a step at least once
  bool prompt_done = false;  // the first answer has computed the prompt; the others may begin
  std::vector<SampleResult> prompt_logprobs;
  SparsityTotals sparsity;
};

class EngineCore {
 public:
  using Clock = std::chrono::steady_clock;

  // Plans and allocates the KV cache and runs one forward pass. See Engine::Create.
  [[nodiscard]] static StatusOr<std::unique_ptr<EngineCore>> Create(const EngineOptions& options,
                                                                    Ops& ops,
                                                                    std::unique_ptr<Model> model,
                                                                    const Tokenizer& tokenizer,
                                                                    MetricsRegistry& metrics);

  // Takes a request that fits (Engine::Submit has checked).
  void Add(RequestHandle handle, Request request, std::shared_ptr<OutputSink> sink,
           Clock::time_point submit_time);

  // Frees the request's blocks, ends its answers with kCancelled, and it with OnEnd. Unknown
  // handles are ignored.
  void Cancel(RequestHandle handle);

  // Ends requests whose deadline is before `now` with kDeadlineExceeded.
  void ExpireDeadlines(Clock::time_point now);

  bool HasWork() const { return scheduler_.HasWork() || !drawing_.empty(); }

  // One step, if there is anything to do. On a GPU the step is one ahead: it is given to the device
  // before the tokens of the one before are read, and these go out while it runs. May throw what
  // the backend throws; then only EndAll may follow.
  void Step();

  // Ends every request.
  void EndAll(FinishReason reason, const Status& error);

  EngineStats stats() const;  // any thread

  // Totals since the start, for the owner's accounting.
  int64_t num_requests_started() const { return num_requests_started_; }  // or ended before
  int64_t num_requests_ended() const { return num_requests_ended_; }

  Device device() const { return ops_.device(); }
  const KvPlan& kv_plan() const { return kv_plan_; }
  const MemoryPlan* memory_plan() const { return memory_plan_ ? &*memory_plan_ : nullptr; }
  // Prompt tokens that fit a step however many sequences decode.
  int min_prefill_tokens() const { return min_prefill_tokens_; }
  const ModelConfig& model_config() const { return model_->config(); }
  [[nodiscard]] Status CheckIntegrity() const { return scheduler_.CheckIntegrity(); }

 private:
  EngineCore(const SchedulerOptions& options, const KvPlan& kv_plan,
             const std::optional<MemoryPlan>& memory_plan, Ops& ops, std::unique_ptr<Model> model,
             const Tokenizer& tokenizer, MetricsRegistry& metrics, KvCachePool kv_pool,
             ModelRunner runner);

  void NoteStarts(const StepPlan& plan);
  void ScorePrompts(const StepPlan& plan, const TensorView& logits);
  // Whether all rows that the plan samples ask for nothing but their largest logit.
  static bool IsGreedy(const StepPlan& plan);
  void SampleTokens(const StepPlan& plan, const LogitRows& logits);
  void CountSparsity(const StepPlan& plan, const StepSparsity& sparsity);
  void ExpectTokens(const StepPlan& plan);
  void TakeTokens();
  void DeliverTokens();
  void DeliverToken(Answer& answer, Clock::time_point now);
  void FinishPrompt(ActiveRequest& active);
  void FinishAnswer(Answer& answer, Clock::time_point now);
  void EndRequest(ActiveRequest& active, FinishReason reason, const Status& error);
  void CloseRequest(ActiveRequest& active);
  void PublishStats();

  const KvPlan kv_plan_;
  const std::optional<MemoryPlan> memory_plan_;  // on a GPU
  const int min_prefill_tokens_;
  Ops& ops_;
  const std::unique_ptr<Model> model_;
  const Tokenizer& tokenizer_;
  MetricsRegistry& metrics_;
  const KvCachePool kv_pool_;
  ModelRunner runner_;
  Scheduler scheduler_;

  absl::flat_hash_map<RequestHandle, std::unique_ptr<ActiveRequest>> requests_;
  // Ended within the current call, which may still hold pointers to them; `drawing_` does not.
  std::vector<std::unique_ptr<ActiveRequest>> ended_;
  std::set<std::pair<Clock::time_point, RequestHandle>> deadlines_;
  std::mt19937_64 seed_source_;  // of requests without a seed
  std::vector<SampleRow> sample_rows_;
  std::vector<SampleResult> sample_results_;  // [max_num_seqs]
  // By row of the last sample, whose tokens the host has not taken: whose answer's it is; null: it
  // is thrown away, because the answer has ended since the step was planned.
  std::vector<Answer*> drawing_;
  // Answers whose last token is part of the sequence and has not gone out.
  std::vector<Answer*> taken_;

  uint64_t num_arrivals_ = 0;
  int num_held_answers_ = 0;  // wait for their request's first answer to compute the prompt
  int64_t num_requests_started_ = 0;
  int64_t num_requests_ended_ = 0;
  int64_t num_prompt_tokens_ = 0;
  int64_t num_generated_tokens_ = 0;

  mutable std::mutex stats_mutex_;
  EngineStats stats_;  // guarded by stats_mutex_; written by the engine thread alone
};

}  // namespace gloam
