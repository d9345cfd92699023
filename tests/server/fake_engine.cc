#include "fake_engine.h"

#include <utility>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

constexpr auto kPatience = std::chrono::minutes(1);  // a broken test ends, a slow machine does not

SampleResult ResultOf(unsigned char byte, int num_logprobs) {
  SampleResult result;
  result.token = byte;
  if (num_logprobs < 0) return result;
  result.logprob = {byte, -0.5f, 1};
  for (int i = 0; i < num_logprobs; ++i) {
    result.top.push_back({(byte + i) % 256, -0.5f - static_cast<float>(i), i + 1});
  }
  return result;
}

}  // namespace

StatusOr<std::vector<int32_t>> ByteTokenizer::Encode(std::span<const TextPart> parts, bool) const {
  std::vector<int32_t> tokens;
  for (const TextPart& part : parts) {
    for (const unsigned char byte : part.text) tokens.push_back(byte);
  }
  return tokens;
}

std::string_view ByteTokenizer::TokenBytes(int32_t id, bool skip_special) const {
  static const std::string bytes = [] {
    std::string all;
    for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
    return all;
  }();
  if (id == kEos) return skip_special ? "" : "<eos>";
  return std::string_view(bytes).substr(id, 1);
}

std::optional<int32_t> ByteTokenizer::FindToken(std::string_view name) const {
  if (name == "<eos>") return kEos;
  return std::nullopt;
}

StatusOr<RequestHandle> FakeEngine::Submit(Request request, std::shared_ptr<OutputSink> sink) {
  std::lock_guard lock(mutex_);
  if (!refusal_.ok()) return refusal_;
  submitted_[++last_handle_] = {std::move(request), std::move(sink)};
  changed_.notify_all();
  return last_handle_;
}

void FakeEngine::Cancel(RequestHandle handle) {
  std::lock_guard lock(mutex_);
  ++submitted_.at(handle).num_cancels;
  changed_.notify_all();
}

void FakeEngine::Refuse(Status refusal) {
  std::lock_guard lock(mutex_);
  refusal_ = std::move(refusal);
}

RequestHandle FakeEngine::WaitForRequest() {
  std::unique_lock lock(mutex_);
  REQUIRE(changed_.wait_for(lock, kPatience, [&] { return last_handle_ > last_returned_; }));
  return ++last_returned_;
}

void FakeEngine::WaitForCancel(RequestHandle handle) {
  std::unique_lock lock(mutex_);
  REQUIRE(
      changed_.wait_for(lock, kPatience, [&] { return submitted_.at(handle).num_cancels > 0; }));
}

const FakeEngine::Submitted& FakeEngine::Find(RequestHandle handle) const {
  std::lock_guard lock(mutex_);
  return submitted_.at(handle);
}

int FakeEngine::num_cancels(RequestHandle handle) const {
  std::lock_guard lock(mutex_);
  return submitted_.at(handle).num_cancels;
}

Request FakeEngine::request(RequestHandle handle) const { return Find(handle).request; }

bool FakeEngine::Push(RequestHandle handle, const std::string& text, int index) {
  const Submitted& submitted = Find(handle);
  OutputDelta delta;
  delta.index = index;
  delta.text = text;
  const int num_logprobs = submitted.request.sampling.num_logprobs;
  for (const unsigned char byte : text) {
    delta.tokens.push_back(byte);
    if (num_logprobs >= 0) delta.logprobs.push_back(ResultOf(byte, num_logprobs));
  }
  return submitted.sink->OnDelta(std::move(delta));
}

void FakeEngine::Finish(RequestHandle handle, FinishReason reason, int index, Status error) {
  OutputDelta delta;
  delta.index = index;
  delta.finish_reason = reason;
  delta.error = std::move(error);
  (void)Find(handle).sink->OnDelta(std::move(delta));
}

void FakeEngine::PushPromptLogprobs(RequestHandle handle) {
  const Submitted& submitted = Find(handle);
  std::vector<SampleResult> results;
  for (const int32_t token : submitted.request.prompt) {
    results.push_back(
        ResultOf(static_cast<unsigned char>(token),
                 results.empty() ? -1 : submitted.request.sampling.num_prompt_logprobs));
  }
  submitted.sink->OnPromptLogprobs(std::move(results));
}

void FakeEngine::End(RequestHandle handle, RequestSummary summary) {
  std::shared_ptr<OutputSink> sink;
  {
    std::lock_guard lock(mutex_);
    sink = std::exchange(submitted_.at(handle).sink, nullptr);
  }
  sink->OnEnd(summary);
}

std::shared_ptr<const PolicyRegistry> BuiltinPolicyRegistry() {
  ModelConfig model;
  model.num_layers = 3;
  model.num_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 64;
  auto registry = PolicyRegistry::Load({}, model);
  REQUIRE(registry.ok());
  return std::make_shared<const PolicyRegistry>(*std::move(registry));
}

}  // namespace gloam
