#include "engine/engine.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <variant>

#include "base/bounded_queue.h"
#include "base/check.h"
#include "base/logging.h"
#include "engine/engine_core.h"
#include "engine/statistics_log.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

// What server threads ask of the engine thread.
struct Submission {
  RequestHandle handle = 0;
  Request request;
  std::shared_ptr<OutputSink> sink;
  Clock::time_point submit_time;
};
struct Cancellation {
  RequestHandle handle = 0;
};
struct CancellationOfAll {};
using Command = std::variant<Submission, Cancellation, CancellationOfAll>;

class ThreadedEngine : public Engine {
 public:
  ThreadedEngine(std::unique_ptr<EngineCore> core, const EngineOptions& options)
      : core_(std::move(core)),
        max_queued_requests_(options.max_queued_requests),
        step_timeout_(options.step_timeout),
        thread_([this] { Run(); }) {}

  ~ThreadedEngine() override {
    {
      std::lock_guard lock(mutex_);
      state_ = State::kStopping;
    }
    commands_.Wake();
    thread_.join();
  }

  StatusOr<RequestHandle> Submit(Request request, std::shared_ptr<OutputSink> sink) override {
    GLOAM_RETURN_IF_ERROR(CheckFits(request));
    std::lock_guard lock(mutex_);
    if (failed_) return Unavailable("the engine has failed; the server must be restarted");
    if (state_ != State::kServing) return Unavailable("the server is shutting down");
    if (num_queued_ >= max_queued_requests_) {
      return ResourceExhausted("{} requests wait already; --max-queued-requests sets how many may",
                               num_queued_);
    }
    const RequestHandle handle = next_handle_++;
    ++num_queued_;
    ++num_live_;
    num_untaken_answers_ += request.n;
    Push(Submission{.handle = handle,
                    .request = std::move(request),
                    .sink = std::move(sink),
                    .submit_time = Clock::now()});
    return handle;
  }

  void Cancel(RequestHandle handle) override {
    std::lock_guard lock(mutex_);
    if (num_live_ > 0) Push(Cancellation{.handle = handle});
  }

  EngineStats stats() const override {
    EngineStats stats = core_->stats();
    std::lock_guard lock(mutex_);
    stats.num_waiting += num_untaken_answers_;
    return stats;
  }

  int max_model_len() const override { return core_->kv_plan().max_model_len; }
  const ModelConfig& model_config() const override { return core_->model_config(); }
  const MemoryPlan* memory_plan() const override { return core_->memory_plan(); }

  bool failed() const override {
    std::lock_guard lock(mutex_);
    return failed_ || StepHangs();
  }

  void Drain(Clock::time_point deadline) override {
    std::unique_lock lock(mutex_);
    if (state_ == State::kServing) state_ = State::kDraining;
    const auto all_ended = [this] { return num_live_ == 0; };
    if (all_ended_.wait_until(lock, deadline, all_ended)) return;
    Push(CancellationOfAll{});
    while (!all_ended_.wait_for(lock, kHangCheck, all_ended) && !StepHangs()) {
    }
  }

 private:
  enum class State { kServing, kDraining, kStopping };

  static constexpr std::chrono::seconds kHangCheck{1};
  // Idle waits end with a command; this only bounds them.
  static constexpr std::chrono::seconds kIdleWait{10};

  Status CheckFits(const Request& request) const {
    const int64_t max_tokens = max_model_len();
    const auto num_prompt = static_cast<int64_t>(request.prompt.size());
    if (num_prompt == 0) return InvalidArgument("the prompt has no tokens");
    const int64_t num_answer = request.sampling.max_tokens == 0 ? 0 : 1;
    if (num_prompt + num_answer > max_tokens) {
      return InvalidArgument(
          "the prompt has {} tokens, but prompt and answer together can have at most {}",
          num_prompt, max_tokens);
    }
    GLOAM_CHECK(request.n >= 1);
    const int vocab_size = model_config().vocab_size;
    for (int32_t token : request.prompt) {
      if (token < 0 || token >= vocab_size) {
        return InvalidArgument("the prompt holds token {}, which is not in [0, {})", token,
                               vocab_size);
      }
    }
    return CheckSparsity(request, core_->device(), core_->kv_plan(), core_->min_prefill_tokens());
  }

  void Push(Command command) { GLOAM_CHECK(commands_.TryPush(std::move(command))); }

  void Run() {
    try {
      StatisticsLog log;
      while (!Stopping()) {
        Apply(core_->HasWork() ? commands_.TakeAll() : commands_.WaitAndTakeAll(kIdleWait));
        core_->ExpireDeadlines(Clock::now());
        step_began_ = Clock::now();
        core_->Step();
        step_began_ = Clock::time_point();
        Account();
        log.Update(core_->stats(), Clock::now());
      }
      Close(Unavailable("the server is shutting down"));
    } catch (const std::exception& error) {
      spdlog::critical("the engine's step failed: {}", error.what());
      {
        std::lock_guard lock(mutex_);
        failed_ = true;
      }
      Close(Internal("the engine failed while it ran this request"));
    }
  }

  bool StepHangs() const {
    const Clock::time_point began = step_began_;
    return step_timeout_ > 0 && began != Clock::time_point() &&
           std::chrono::duration<double>(Clock::now() - began).count() > step_timeout_;
  }

  bool Stopping() const {
    std::lock_guard lock(mutex_);
    return state_ == State::kStopping;
  }

  // Ends everything. No Submit is accepted any more, so the queue stays empty afterwards.
  void Close(const Status& error) {
    Apply(commands_.TakeAll());
    core_->EndAll(FinishReason::kError, error);
    Account();
  }

  void Apply(std::deque<Command> commands) {
    for (Command& command : commands) {
      if (auto* submission = std::get_if<Submission>(&command)) {
        {
          std::lock_guard lock(mutex_);
          num_untaken_answers_ -= submission->request.n;
        }
        core_->Add(submission->handle, std::move(submission->request), std::move(submission->sink),
                   submission->submit_time);
      } else if (auto* cancellation = std::get_if<Cancellation>(&command)) {
        core_->Cancel(cancellation->handle);
      } else {
        core_->EndAll(FinishReason::kCancelled, OkStatus());
      }
    }
  }

  // Passes on what left the queue and what ended since the last call.
  void Account() {
    const int64_t num_started = core_->num_requests_started();
    const int64_t num_ended = core_->num_requests_ended();
    if (num_started == num_accounted_started_ && num_ended == num_accounted_ended_) return;
    std::lock_guard lock(mutex_);
    num_queued_ -= num_started - std::exchange(num_accounted_started_, num_started);
    num_live_ -= num_ended - std::exchange(num_accounted_ended_, num_ended);
    if (num_live_ == 0) all_ended_.notify_all();
  }

  const std::unique_ptr<EngineCore> core_;
  const int64_t max_queued_requests_;
  const double step_timeout_;
  std::atomic<Clock::time_point> step_began_{Clock::time_point()};  // of the running step, if any
  // Its length is bounded by max_queued_requests (submissions) and by the front ends, which cancel
  // a request once; a cancellation must never be refused.
  BoundedQueue<Command> commands_{std::numeric_limits<size_t>::max()};

  mutable std::mutex mutex_;
  std::condition_variable all_ended_;
  State state_ = State::kServing;
  bool failed_ = false;
  RequestHandle next_handle_ = 1;
  int64_t num_queued_ = 0;       // requests that no step has begun yet
  int64_t num_live_ = 0;         // requests whose OnEnd is still to come
  int num_untaken_answers_ = 0;  // answers of submissions in commands_

  // Engine thread only.
  int64_t num_accounted_started_ = 0;
  int64_t num_accounted_ended_ = 0;

  std::thread thread_;  // last: it uses all of the above
};

}  // namespace

StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, Ops& ops,
                                                 std::unique_ptr<Model> model,
                                                 const Tokenizer& tokenizer,
                                                 MetricsRegistry& metrics) {
  GLOAM_ASSIGN_OR_RETURN(std::unique_ptr<EngineCore> core,
                         EngineCore::Create(options, ops, std::move(model), tokenizer, metrics));
  return std::make_unique<ThreadedEngine>(std::move(core), options);
}

}  // namespace gloam
