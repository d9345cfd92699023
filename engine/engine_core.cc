#include "engine/engine_core.h"

#include <algorithm>
#include <limits>
#include <span>

#include "base/check.h"
#include "base/logging.h"

namespace gloam {
namespace {

// Prompt tokens that get log-probabilities in one step: bounds the logits' memory (4 bytes x
// vocabulary each), and costs only requests with prompt_logprobs, whose chunks are this short.
constexpr int kMaxScoreRows = 64;

double Seconds(EngineCore::Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// SplitMix64's finaliser (Steele, Lea, Flood 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The seed of answer `index` of a request with seed `seed`.
uint64_t AnswerSeed(uint64_t seed, int index) {
  return Mix(Mix(seed) + static_cast<uint64_t>(index));
}

Status CheckOptions(const EngineOptions& options) {
  if (options.max_num_seqs < 1) {
    return InvalidArgument("--max-num-seqs {} is below 1", options.max_num_seqs);
  }
  if (options.max_num_batched_tokens < 1) {
    return InvalidArgument("--max-num-batched-tokens {} is below 1",
                           options.max_num_batched_tokens);
  }
  if (!(options.gpu_memory_utilization > 0 && options.gpu_memory_utilization <= 1)) {
    return InvalidArgument("--gpu-memory-utilization {} is not in (0, 1]",
                           options.gpu_memory_utilization);
  }
  if (options.max_queued_requests < 1) {
    return InvalidArgument("--max-queued-requests {} is below 1", options.max_queued_requests);
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<EngineCore>> EngineCore::Create(const EngineOptions& options, Ops& ops,
                                                         std::unique_ptr<Model> model,
                                                         const Tokenizer& tokenizer,
                                                         MetricsRegistry& metrics) {
  GLOAM_RETURN_IF_ERROR(CheckOptions(options));
  GLOAM_RETURN_IF_ERROR(CheckKvDType(options.kv_cache_dtype, ops.device()));
  GLOAM_ASSIGN_OR_RETURN(const int max_model_len, WantedModelLen(options, model->config()));

  SchedulerOptions scheduling;
  scheduling.max_num_batched_tokens = options.max_num_batched_tokens;
  // Every running sequence needs room for its token in each step.
  scheduling.max_num_seqs = std::min(options.max_num_seqs, options.max_num_batched_tokens);
  scheduling.max_tokens_beside_decode = options.max_num_batched_tokens;
  if (options.max_tokens_beside_decode > 0) {
    scheduling.max_tokens_beside_decode = std::clamp(
        options.max_tokens_beside_decode, scheduling.max_num_seqs, options.max_num_batched_tokens);
  }
  scheduling.max_score_rows = std::min(kMaxScoreRows, options.max_num_batched_tokens);
  scheduling.enable_prefix_caching = options.enable_prefix_caching;

  // The cache gets what is left when everything else is there.
  const DeviceMemory before_workspaces = ops.memory();
  const ModelRunnerLimits limits = {.max_num_seqs = scheduling.max_num_seqs,
                                    .max_num_batched_tokens = scheduling.max_num_batched_tokens,
                                    .max_score_rows = scheduling.max_score_rows,
                                    .max_model_len = max_model_len,
                                    .kv_dtype = options.kv_cache_dtype};
  GLOAM_ASSIGN_OR_RETURN(ModelRunner runner, ModelRunner::Create(limits, ops, *model));
  std::optional<MemoryPlan> memory;
  if (ops.device() == Device::kCuda) {
    memory = PlanMemory(options.gpu_memory_utilization, model->weight_bytes(), before_workspaces,
                        ops.memory());
  }
  GLOAM_ASSIGN_OR_RETURN(const KvPlan plan,
                         PlanKvCache(options, model->config(), memory ? &*memory : nullptr));
  if (memory) {
    memory->sidecar_bytes = plan.num_blocks * plan.sidecar_bytes_per_block;
    memory->kv_bytes = plan.num_blocks * plan.bytes_per_block - memory->sidecar_bytes;
  }
  scheduling.num_blocks = plan.num_blocks;
  GLOAM_ASSIGN_OR_RETURN(KvCachePool pool,
                         KvCachePool::Create(ops, plan, model->config().num_layers));
  runner.SetCache(pool.layers(), pool.sidecars());
  GLOAM_RETURN_IF_ERROR(runner.WarmUp());
  metrics.SetCacheConfig(kBlockTokens, plan.num_blocks);
  return std::unique_ptr<EngineCore>(new EngineCore(scheduling, plan, memory, ops, std::move(model),
                                                    tokenizer, metrics, std::move(pool),
                                                    std::move(runner)));
}

EngineCore::EngineCore(const SchedulerOptions& options, const KvPlan& kv_plan,
                       const std::optional<MemoryPlan>& memory_plan, Ops& ops,
                       std::unique_ptr<Model> model, const Tokenizer& tokenizer,
                       MetricsRegistry& metrics, KvCachePool kv_pool, ModelRunner runner)
    : kv_plan_(kv_plan),
      memory_plan_(memory_plan),
      min_prefill_tokens_(std::max(1, options.max_tokens_beside_decode - options.max_num_seqs + 1)),
      ops_(ops),
      model_(std::move(model)),
      tokenizer_(tokenizer),
      metrics_(metrics),
      kv_pool_(std::move(kv_pool)),
      runner_(std::move(runner)),
      scheduler_(options),
      seed_source_(std::random_device{}()),
      sample_results_(options.max_num_seqs) {
  sample_rows_.reserve(options.max_num_seqs);
  drawing_.reserve(options.max_num_seqs);
  taken_.reserve(options.max_num_seqs);
  stats_.num_blocks_total = kv_plan.num_blocks;
}

void EngineCore::Add(RequestHandle handle, Request request, std::shared_ptr<OutputSink> sink,
                     Clock::time_point submit_time) {
  auto active = std::make_unique<ActiveRequest>();
  active->handle = handle;
  active->request = std::move(request);
  active->sink = std::move(sink);
  active->submit_time = submit_time;
  active->num_unfinished = active->request.n;

  const SamplingParams& sampling = active->request.sampling;
  const uint64_t seed = sampling.seed ? *sampling.seed : seed_source_();
  const int room = kv_plan_.max_model_len - static_cast<int>(active->request.prompt.size());
  const int max_new_tokens = std::min(sampling.max_tokens.value_or(room), room);
  const uint64_t arrival = num_arrivals_++;
  for (int i = 0; i < active->request.n; ++i) {
    const SequenceOrder order = {
        .priority = active->request.priority, .arrival = arrival, .index = i};
    active->answers.push_back(std::make_unique<Answer>(active->request, order, AnswerSeed(seed, i),
                                                       max_new_tokens, tokenizer_));
    active->answers.back()->active_request = active.get();
    SetUpSparsity(active->request, model_->config(), active->answers.back()->sequence());
  }
  // The other answers begin when the first has computed the prompt, and find it in the cache.
  scheduler_.Add(active->answers.front()->sequence());
  num_held_answers_ += active->request.n - 1;
  if (active->request.deadline) deadlines_.emplace(*active->request.deadline, handle);
  requests_.emplace(handle, std::move(active));
  PublishStats();
}

void EngineCore::Cancel(RequestHandle handle) {
  const auto it = requests_.find(handle);
  if (it != requests_.end()) EndRequest(*it->second, FinishReason::kCancelled, OkStatus());
  ended_.clear();
}

void EngineCore::ExpireDeadlines(Clock::time_point now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    ActiveRequest& active = *requests_.at(deadlines_.begin()->second);
    EndRequest(
        active, FinishReason::kError,
        MakeStatus(StatusCode::kDeadlineExceeded, "the request's deadline passed while it {}",
                   active.started ? "was running" : "waited in the queue"));
  }
  ended_.clear();
}

void EngineCore::EndAll(FinishReason reason, const Status& error) {
  DeliverTokens();  // of a step that threw afterwards
  while (!requests_.empty()) EndRequest(*requests_.begin()->second, reason, error);
  ended_.clear();
}

void EngineCore::Step() {
  const StepPlan& plan = scheduler_.Schedule();
  if (plan.sequences.empty()) {
    TakeTokens();
  } else {
    NoteStarts(plan);
    const ModelRunner::Result result = runner_.Forward(plan, IsGreedy(plan));
    TakeTokens();  // of the step before, while a GPU works on this one
    ScorePrompts(plan, result.score);
    SampleTokens(plan, result.sample);
    CountSparsity(plan, result.sparsity);
    scheduler_.Advance();
    ExpectTokens(plan);
    if (ops_.device() == Device::kCpu) TakeTokens();  // its operations are complete already
  }
  DeliverTokens();
  PublishStats();
  ended_.clear();
}

void EngineCore::NoteStarts(const StepPlan& plan) {
  for (const ScheduledSequence& scheduled : plan.sequences) {
    ActiveRequest& active = *scheduled.sequence->answer->active_request;
    if (active.started) continue;
    active.started = true;
    ++num_requests_started_;
    metrics_.request_queue_time.Observe(Seconds(Clock::now() - active.submit_time));
  }
}

void EngineCore::ScorePrompts(const StepPlan& plan, const TensorView& logits) {
  int row = 0;
  for (const ScheduledSequence& scheduled : plan.sequences) {
    if (scheduled.num_score_rows == 0) continue;
    const Sequence& sequence = *scheduled.sequence;
    ActiveRequest& active = *sequence.answer->active_request;
    const int position = sequence.num_computed + scheduled.first_score_row;
    std::vector<SampleResult>& scores = active.prompt_logprobs;
    if (scores.empty()) {  // the first token follows nothing
      scores.push_back({.token = sequence.tokens[0], .logprob = {.token = sequence.tokens[0]}});
    }
    GLOAM_CHECK(static_cast<int>(scores.size()) == position + 1);
    scores.resize(scores.size() + scheduled.num_score_rows);
    ops_.Score(
        {.logits = logits.Rows(row, scheduled.num_score_rows),
         .tokens = std::span(sequence.tokens).subspan(position + 1, scheduled.num_score_rows),
         .num_logprobs = active.request.sampling.num_prompt_logprobs,
         .results = std::span(scores).last(scheduled.num_score_rows)});
    row += scheduled.num_score_rows;
  }
}

bool EngineCore::IsGreedy(const StepPlan& plan) {
  return std::all_of(plan.sequences.begin(), plan.sequences.end(), [](const auto& scheduled) {
    return !scheduled.samples || scheduled.sequence->answer->MakeSampleRow().is_greedy();
  });
}

void EngineCore::SampleTokens(const StepPlan& plan, const LogitRows& logits) {
  sample_rows_.clear();
  for (const ScheduledSequence& scheduled : plan.sequences) {
    if (!scheduled.samples) continue;
    const Answer& answer = *scheduled.sequence->answer;
    // Ended by the token before, this step's is nobody's.
    sample_rows_.push_back(answer.taken_is_last() ? SampleRow{.temperature = 0}
                                                  : answer.MakeSampleRow());
  }
  if (sample_rows_.empty()) return;
  const std::span results = std::span(sample_results_).first(sample_rows_.size());
  std::fill(results.begin(), results.end(), SampleResult());
  ops_.Sample({.logits = logits, .rows = sample_rows_, .results = results});
}

void EngineCore::CountSparsity(const StepPlan& plan, const StepSparsity& sparsity) {
  for (size_t row = 0; row < sparsity.rows.size(); ++row) {
    const SparseRow& sparse = sparsity.rows[row];
    const ScheduledSequence& scheduled = plan.sequences[sparse.seq];
    Answer& answer = *scheduled.sequence->answer;
    const int position = runner_.Position(sparse.token);
    if (position < answer.num_counted_tokens) continue;  // recomputed after a pre-emption
    answer.num_counted_tokens = position + 1;
    answer.active_request->sparsity.AddSparseStep(sparsity, row);
  }
  for (const ScheduledSequence& scheduled : plan.sequences) {
    const Sequence& sequence = *scheduled.sequence;
    if (sequence.policy == nullptr) continue;
    Answer& answer = *sequence.answer;
    const int begin = std::max(answer.num_counted_tokens, sequence.num_dense_prompt_tokens);
    const int end =
        std::min(sequence.num_computed + scheduled.num_tokens, sequence.first_sparse_token);
    if (begin >= end) continue;
    answer.num_counted_tokens = end;
    answer.active_request->sparsity.AddBypassedSteps(end - begin);
  }
}

// What the next step needs to know of this one's tokens: that they will be there.
void EngineCore::ExpectTokens(const StepPlan& plan) {
  for (const ScheduledSequence& scheduled : plan.sequences) {
    if (!scheduled.samples) continue;
    Answer& answer = *scheduled.sequence->answer;
    const auto row = static_cast<int>(drawing_.size());
    drawing_.push_back(answer.taken_is_last() ? nullptr : &answer);
    if (answer.taken_is_last()) continue;
    if (!answer.active_request->prompt_done) FinishPrompt(*answer.active_request);
    const bool is_last = answer.NextIsLast();
    if (answer.MayGenerate()) answer.Expect(row);
    if (is_last) scheduler_.Remove(answer.sequence());
  }
}

// Waits for the tokens of the last sample and puts them into their sequences.
void EngineCore::TakeTokens() {
  if (drawing_.empty()) return;
  ops_.FinishSample();
  const Clock::time_point now = Clock::now();
  for (size_t row = 0; row < drawing_.size(); ++row) {
    if (drawing_[row] == nullptr) continue;
    Answer& answer = *drawing_[row];
    taken_.push_back(&answer);
    if (!answer.MayGenerate()) continue;
    if (answer.num_generated() == 0) {
      metrics_.time_to_first_token.Observe(Seconds(now - answer.active_request->submit_time));
    } else {
      metrics_.inter_token_latency.Observe(Seconds(now - answer.last_token_time));
    }
    answer.last_token_time = now;
    answer.Take(std::move(sample_results_[row]));
    ++num_generated_tokens_;
  }
  drawing_.clear();
}

// Text, stop rules, deltas. Not while a step is planned and not advanced: sequences may end.
void EngineCore::DeliverTokens() {
  const Clock::time_point now = Clock::now();
  for (Answer* answer : taken_) {
    // A sink that overflowed on another answer of the request has ended this one.
    if (!answer->finished()) DeliverToken(*answer, now);
  }
  taken_.clear();
}

void EngineCore::DeliverToken(Answer& answer, Clock::time_point now) {
  ActiveRequest& active = *answer.active_request;
  if (answer.has_taken()) {
    answer.Deliver();
  } else {
    answer.Finish(FinishReason::kLength);  // it was to have no tokens
  }
  if (answer.finished()) FinishAnswer(answer, now);
  if (answer.HasDelta() && !active.sink->OnDelta(answer.TakeDelta())) {
    EndRequest(active, FinishReason::kCancelled, OkStatus());
  } else if (active.num_unfinished == 0) {
    CloseRequest(active);
  }
}

void EngineCore::FinishPrompt(ActiveRequest& active) {
  active.prompt_done = true;
  num_prompt_tokens_ += static_cast<int64_t>(active.request.prompt.size());
  if (active.request.sampling.num_prompt_logprobs >= 0) {
    if (active.prompt_logprobs.empty()) {  // a prompt of one token has nothing to score
      const int32_t token = active.request.prompt[0];
      active.prompt_logprobs.push_back({.token = token, .logprob = {.token = token}});
    }
    active.sink->OnPromptLogprobs(std::move(active.prompt_logprobs));
  }
  for (size_t i = 1; i < active.answers.size(); ++i) scheduler_.Add(active.answers[i]->sequence());
  num_held_answers_ -= active.request.n - 1;
}

void EngineCore::FinishAnswer(Answer& answer, Clock::time_point now) {
  scheduler_.Remove(answer.sequence());
  std::replace(drawing_.begin(), drawing_.end(), &answer, static_cast<Answer*>(nullptr));
  --answer.active_request->num_unfinished;
  metrics_.RequestSuccess(answer.finish_reason()).Increment();
  metrics_.e2e_request_latency.Observe(Seconds(now - answer.active_request->submit_time));
}

void EngineCore::EndRequest(ActiveRequest& active, FinishReason reason, const Status& error) {
  const Clock::time_point now = Clock::now();
  for (const auto& answer : active.answers) {
    if (answer->finished()) continue;
    answer->Finish(reason, error);
    FinishAnswer(*answer, now);
  }
  for (const auto& answer : active.answers) {
    // The request ends in any case, so a full sink changes nothing.
    if (answer->HasDelta()) (void)active.sink->OnDelta(answer->TakeDelta());
  }
  CloseRequest(active);
}

void EngineCore::CloseRequest(ActiveRequest& active) {
  GLOAM_CHECK(active.num_unfinished == 0);
  if (!active.started) ++num_requests_started_;
  if (!active.prompt_done) num_held_answers_ -= active.request.n - 1;
  ++num_requests_ended_;
  if (active.request.deadline) deadlines_.erase({*active.request.deadline, active.handle});

  RequestSummary summary;
  summary.prompt_tokens = static_cast<int>(active.request.prompt.size());
  summary.cached_tokens = std::max(0, active.answers.front()->sequence().num_cached_tokens);
  for (const auto& answer : active.answers) summary.completion_tokens += answer->num_generated();
  if (active.request.sparsity != nullptr) {
    summary.sparsity = active.sparsity.Usage(*active.request.sparsity);
    metrics_.ObserveSparsity(*summary.sparsity);
  }

  const auto it = requests_.find(active.handle);
  ended_.push_back(std::move(it->second));
  requests_.erase(it);
  PublishStats();  // whoever sees OnEnd sees the blocks free
  active.sink->OnEnd(summary);
  active.sink.reset();
}

EngineStats EngineCore::stats() const {
  std::lock_guard lock(stats_mutex_);
  return stats_;
}

void EngineCore::PublishStats() {
  EngineStats now;
  now.num_waiting = scheduler_.num_waiting() + num_held_answers_;
  now.num_running = scheduler_.num_running();
  now.num_blocks_total = scheduler_.blocks().num_blocks();
  now.num_blocks_in_use = scheduler_.blocks().num_in_use();
  now.prompt_tokens_total = num_prompt_tokens_;
  now.generation_tokens_total = num_generated_tokens_;
  now.num_preemptions_total = scheduler_.num_preemptions();
  now.prefix_cache_queries = scheduler_.num_prefix_queries();
  now.prefix_cache_hits = scheduler_.num_prefix_hits();

  metrics_.num_requests_waiting.Set(now.num_waiting);
  metrics_.num_requests_running.Set(now.num_running);
  metrics_.kv_cache_usage.Set(static_cast<double>(now.num_blocks_in_use) /
                              static_cast<double>(now.num_blocks_total));
  const auto advance = [](prometheus::Counter& counter, int64_t from, int64_t to) {
    if (to > from) counter.Increment(static_cast<double>(to - from));
  };
  const EngineStats& last = stats_;
  advance(metrics_.prompt_tokens, last.prompt_tokens_total, now.prompt_tokens_total);
  advance(metrics_.generation_tokens, last.generation_tokens_total, now.generation_tokens_total);
  advance(metrics_.num_preemptions, last.num_preemptions_total, now.num_preemptions_total);
  advance(metrics_.prefix_cache_queries, last.prefix_cache_queries, now.prefix_cache_queries);
  advance(metrics_.prefix_cache_hits, last.prefix_cache_hits, now.prefix_cache_hits);

  std::lock_guard lock(stats_mutex_);
  stats_ = now;
}

}  // namespace gloam
