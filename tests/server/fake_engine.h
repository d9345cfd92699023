// What the front ends' tests serve instead of a model: an engine whose output the test pushes,
// and a tokenizer of bytes.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "models/attention/policy_registry.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

// One token per byte (ids 0-255), and the end-of-sequence token 256.
class ByteTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kEos = 256;

  int vocab_size() const override { return 257; }
  StatusOr<std::vector<int32_t>> Encode(std::span<const TextPart> parts,
                                        bool add_special) const override;
  std::string_view TokenBytes(int32_t id, bool skip_special) const override;
  bool strips_leading_space() const override { return false; }
  bool IsSpecial(int32_t id) const override { return id == kEos; }
  std::optional<int32_t> FindToken(std::string_view name) const override;
  std::optional<int32_t> bos_id() const override { return std::nullopt; }
  std::span<const int32_t> eos_ids() const override { return {&kEos, 1}; }
};

// Accepts every request and does nothing with it: the test is the engine thread.
class FakeEngine : public Engine {
 public:
  StatusOr<RequestHandle> Submit(Request request, std::shared_ptr<OutputSink> sink) override;
  void Cancel(RequestHandle handle) override;
  EngineStats stats() const override { return {}; }
  int max_model_len() const override { return 1024; }
  const ModelConfig& model_config() const override { return config_; }
  const MemoryPlan* memory_plan() const override { return nullptr; }
  bool failed() const override { return false; }
  void Drain(std::chrono::steady_clock::time_point) override {}

  // What Submit answers from now on; OK: it accepts.
  void Refuse(Status refusal);

  // Waits for the next request that no call of this returned yet. Fails the test after a minute.
  RequestHandle WaitForRequest();
  // Waits until the request was cancelled. Fails the test after a minute.
  void WaitForCancel(RequestHandle handle);
  int num_cancels(RequestHandle handle) const;
  Request request(RequestHandle handle) const;

  // To the request's sink, as the engine would. Text becomes one token per byte, with a
  // log-probability of -0.5 and the next byte as the runner-up when any were asked for.
  bool Push(RequestHandle handle, const std::string& text, int index = 0);
  void Finish(RequestHandle handle, FinishReason reason = FinishReason::kStop, int index = 0,
              Status error = OkStatus());
  void PushPromptLogprobs(RequestHandle handle);
  void End(RequestHandle handle, RequestSummary summary = {});

 private:
  struct Submitted {
    Request request;
    std::shared_ptr<OutputSink> sink;
    int num_cancels = 0;
  };

  const Submitted& Find(RequestHandle handle) const;

  ModelConfig config_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Status refusal_;
  RequestHandle last_handle_ = 0;
  RequestHandle last_returned_ = 0;
  std::map<RequestHandle, Submitted> submitted_;
};

// The built-in policies, for a model of three layers: those that need no channel file are usable.
std::shared_ptr<const PolicyRegistry> BuiltinPolicyRegistry();

}  // namespace gloam
