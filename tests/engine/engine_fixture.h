// An engine over the fake model, for tests.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "engine/engine.h"
#include "engine/metrics.h"
#include "tests/engine/collecting_sink.h"
#include "tests/engine/fake_model.h"

namespace gloam::testing {

// Lets a test hold the engine thread inside a forward pass.
class Gate {
 public:
  // Called by the model: waits while closed.
  void Pass() {
    std::unique_lock lock(mutex_);
    ++num_arrivals_;
    held_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_ || num_permits_ > 0; });
    held_ = false;
    if (!open_) --num_permits_;
  }
  void Close() {
    Set([this] { open_ = false; });
  }
  void Open() {
    Set([this] { open_ = true; });
  }
  // Waits until the model stands before the closed gate.
  void WaitUntilHeld() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return held_ && !open_ && num_permits_ == 0; });
  }
  void LetOnePass() {
    Set([this] { ++num_permits_; });
  }
  // Waits until the model has arrived `n` times in all.
  void WaitForArrival(int n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this, n] { return num_arrivals_ >= n; });
  }
  int num_arrivals() {
    std::lock_guard lock(mutex_);
    return num_arrivals_;
  }

 private:
  void Set(const std::function<void()>& change) {
    std::lock_guard lock(mutex_);
    change();
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  bool held_ = false;
  int num_permits_ = 0;
  int num_arrivals_ = 0;
};

inline EngineOptions SmallOptions() {
  EngineOptions options;
  options.num_kv_blocks = 64;
  options.max_num_seqs = 8;
  options.max_num_batched_tokens = 64;
  return options;
}

struct TestEngine {
  explicit TestEngine(const EngineOptions& options = SmallOptions(),
                      const std::function<void(FakeModel&)>& configure = {},
                      Device device = Device::kCpu)
      : ops(device) {
    auto model = std::make_unique<FakeModel>();
    model->ops = &ops;
    if (configure) configure(*model);
    engine = Engine::Create(options, ops, std::move(model), tokenizer, metrics).value();
  }
  Engine* operator->() { return engine.get(); }

  // Submits, waits for the end, and returns the sink.
  std::shared_ptr<CollectingSink> Run(Request request) {
    auto sink = std::make_shared<CollectingSink>(request.n);
    GLOAM_CHECK(engine->Submit(std::move(request), sink).ok());
    sink->Wait();
    return sink;
  }

  FakeOps ops;
  FakeTokenizer tokenizer;
  MetricsRegistry metrics{"fake"};
  std::unique_ptr<Engine> engine;
};

inline Request GreedyRequest(std::vector<int32_t> prompt, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  return request;
}

// A model that answers with `script`, whatever the prompt, and ends there.
inline std::function<void(FakeModel&)> Says(std::vector<int32_t> script, size_t num_prompt) {
  return [script = std::move(script), num_prompt](FakeModel& model) {
    model.next_token = [script, num_prompt](std::span<const int32_t> history) {
      const size_t at = history.size() - num_prompt;
      return history.size() >= num_prompt && at < script.size() ? script[at] : FakeTokenizer::kEos;
    };
  };
}

}  // namespace gloam::testing
