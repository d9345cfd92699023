// The engine one step ahead of a device: a step is planned and enqueued before the tokens of the
// one before are known. What it answers is what it answers on the CPU, which knows them.
#include <algorithm>
#include <memory>
#include <vector>

#include "catch2/catch.hpp"
#include "engine/engine_core.h"
#include "tests/engine/engine_fixture.h"

namespace gloam {
namespace {

using testing::CollectingSink;
using testing::FakeModel;
using testing::FakeOps;
using testing::GreedyRequest;
using testing::Says;
using testing::SmallOptions;
using testing::Tokens;

// An engine without its thread, whose steps the test takes.
struct SteppedEngine {
  explicit SteppedEngine(Device device, const EngineOptions& options = SmallOptions(),
                         const std::function<void(FakeModel&)>& configure = {})
      : ops(device) {
    auto model = std::make_unique<FakeModel>();
    model->ops = &ops;
    if (configure) configure(*model);
    core = EngineCore::Create(options, ops, std::move(model), tokenizer, metrics).value();
  }

  std::shared_ptr<CollectingSink> Add(const Request& request) {
    auto sink = std::make_shared<CollectingSink>(request.n);
    core->Add(++last_handle, request, sink, EngineCore::Clock::now());
    return sink;
  }
  void Step() {
    core->Step();
    const Status status = core->CheckIntegrity();
    INFO(status.ToString());
    REQUIRE(status.ok());
  }
  void Finish() {
    while (core->HasWork()) Step();
    CHECK(core->stats().num_blocks_in_use == 0);
  }

  FakeOps ops;
  testing::FakeTokenizer tokenizer;
  MetricsRegistry metrics{"fake"};
  std::unique_ptr<EngineCore> core;
  RequestHandle last_handle = 0;
};

void RequireSame(CollectingSink& a, CollectingSink& b, int n = 1) {
  for (int i = 0; i < n; ++i) {
    CAPTURE(i);
    REQUIRE(a.ended());
    REQUIRE(b.ended());
    CHECK(a.output(i).tokens == b.output(i).tokens);
    CHECK(a.output(i).text == b.output(i).text);
    CHECK(a.output(i).finish_reason == b.output(i).finish_reason);
    CHECK(a.output(i).stop_reason == b.output(i).stop_reason);
    REQUIRE(a.output(i).logprobs.size() == b.output(i).logprobs.size());
    for (size_t j = 0; j < a.output(i).logprobs.size(); ++j) {
      CHECK(a.output(i).logprobs[j].logprob.logprob == b.output(i).logprobs[j].logprob.logprob);
      CHECK(a.output(i).logprobs[j].top.size() == b.output(i).logprobs[j].top.size());
    }
  }
}

// Runs the requests together on the CPU and on a GPU; returns the GPU's engine.
std::unique_ptr<SteppedEngine> RequireSameOnGpu(
    const std::vector<Request>& requests, const EngineOptions& options = SmallOptions(),
    const std::function<void(FakeModel&)>& configure = {}) {
  SteppedEngine cpu(Device::kCpu, options, configure);
  auto gpu = std::make_unique<SteppedEngine>(Device::kCuda, options, configure);
  std::vector<std::shared_ptr<CollectingSink>> on_cpu, on_gpu;
  for (const Request& request : requests) {
    on_cpu.push_back(cpu.Add(request));
    on_gpu.push_back(gpu->Add(request));
  }
  cpu.Finish();
  gpu->Finish();
  for (size_t i = 0; i < requests.size(); ++i) {
    CAPTURE(i);
    RequireSame(*on_cpu[i], *on_gpu[i], requests[i].n);
  }
  CHECK(cpu.ops.num_tokens_handed_over == 0);
  CHECK(gpu->ops.num_tokens_handed_over > 0);
  return gpu;
}

TEST_CASE("every token but the last goes to the next step on the device") {
  SteppedEngine gpu(Device::kCuda);
  Request request = GreedyRequest(Tokens("abc"), 9);
  request.sampling.ignore_eos = true;
  const auto sink = gpu.Add(request);
  gpu.Step();
  CHECK_FALSE(sink->ended());
  gpu.Finish();
  CHECK(sink->output().tokens.size() == 9);
  CHECK(gpu.ops.num_tokens_handed_over == 8);
}

TEST_CASE("what the sampler needs of earlier tokens is there, though a step is under way") {
  std::vector<Request> requests(9, GreedyRequest(Tokens("abc"), 40));
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt.push_back(static_cast<int32_t>(1 + i));
    requests[i].sampling.ignore_eos = i % 2 == 0;
  }
  requests[1].sampling.frequency_penalty = 1.5f;
  requests[2].sampling.presence_penalty = 2.0f;
  requests[3].sampling.repetition_penalty = 1.3f;
  requests[3].sampling.frequency_penalty = 0.7f;
  requests[4].sampling.logit_bias = {{5, 1.5f}, {9, -100.0f}};
  requests[5].sampling.min_tokens = 20;
  requests[5].sampling.stop_token_ids = {3, 17, 22, 30, 41};
  requests[6].sampling.temperature = 1.0f;
  requests[6].sampling.seed = 42;
  requests[6].sampling.num_logprobs = 3;
  requests[7].sampling.num_logprobs = 0;
  requests[8].sampling.temperature = 0.7f;
  requests[8].sampling.seed = 7;
  requests[8].sampling.presence_penalty = 0.5f;
  RequireSameOnGpu(requests);
}

TEST_CASE("a penalty counts the token that has just been read") {
  // The model wants "b" always; every "b" costs more than the one before.
  const auto configure = [](FakeModel& model) {
    model.next_token = [](std::span<const int32_t>) { return 2; };
  };
  Request request = GreedyRequest(Tokens("aaa"), 30);
  request.sampling.ignore_eos = true;
  request.sampling.frequency_penalty = 2.0f;
  std::vector<Request> requests = {request};
  RequireSameOnGpu(requests, SmallOptions(), configure);
}

TEST_CASE("an answer that ends leaves a row that is nobody's; the others go on") {
  const auto configure = Says(Tokens("abcdefghijklmnop"), 1);
  std::vector<Request> requests(5, GreedyRequest(Tokens("z"), 30));
  requests[1].sampling.stop = {"def"};
  requests[2].sampling.stop_token_ids = {9};
  requests[3].sampling.max_tokens = 5;
  requests[4].sampling.max_tokens = 0;
  requests.push_back(requests[1]);
  requests.back().n = 3;
  RequireSameOnGpu(requests, SmallOptions(), configure);
}

TEST_CASE("several answers to one prompt begin in the step after the prompt's, and end apart") {
  std::vector<Request> requests(3, GreedyRequest(Tokens("the same beginning for all"), 25));
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].n = 4;
    requests[i].sampling.temperature = 1.0f;
    requests[i].sampling.seed = 100 + i;
  }
  requests[2].sampling.num_prompt_logprobs = 1;
  RequireSameOnGpu(requests);

  SteppedEngine gpu(Device::kCuda);
  gpu.Add(requests[0]);
  gpu.Step();
  gpu.Step();
  CHECK(gpu.core->stats().num_running == 4);
  gpu.Finish();
}

TEST_CASE("cancelling does not wait for the step under way, and leaves no block in use") {
  for (int num_steps = 1; num_steps < 24; ++num_steps) {
    CAPTURE(num_steps);
    EngineOptions options = SmallOptions();
    options.num_kv_blocks = 6;
    options.max_model_len = 64;
    SteppedEngine gpu(Device::kCuda, options);
    Request request = GreedyRequest(Tokens("abcdefghijklmn"), 20);
    request.sampling.ignore_eos = true;
    const auto cancelled = gpu.Add(request);
    request.prompt[0] = 9;
    const auto other = gpu.Add(request);
    for (int i = 0; i < num_steps; ++i) gpu.Step();
    gpu.core->Cancel(1);
    CHECK(cancelled->ended());
    REQUIRE(gpu.core->CheckIntegrity().ok());
    CHECK(gpu.core->stats().num_blocks_in_use <= 3);
    // The blocks are given away while the device still writes to them.
    request.prompt[0] = 5;
    const auto next = gpu.Add(request);
    gpu.Finish();
    CHECK(other->output().tokens.size() == 20);

    SteppedEngine cpu(Device::kCpu, options);
    const auto alone = cpu.Add(request);
    cpu.Finish();
    RequireSame(*next, *alone);
  }
}

TEST_CASE("ending all requests with a step under way, then going on") {
  SteppedEngine gpu(Device::kCuda);
  Request request = GreedyRequest(Tokens("abc"), 20);
  request.sampling.ignore_eos = true;
  const auto ended = gpu.Add(request);
  for (int i = 0; i < 3; ++i) gpu.Step();
  gpu.core->EndAll(FinishReason::kCancelled, OkStatus());
  CHECK(ended->output().finish_reason == FinishReason::kCancelled);
  CHECK(gpu.core->stats().num_blocks_in_use == 0);
  CHECK(gpu.core->HasWork());  // a sample to be thrown away
  gpu.Step();
  CHECK_FALSE(gpu.core->HasWork());
  const auto next = gpu.Add(request);
  gpu.Finish();
  CHECK(next->output().tokens.size() == 20);
}

TEST_CASE("pre-emption of a sequence whose last token is being drawn") {
  EngineOptions options = SmallOptions();
  options.num_kv_blocks = 5;
  options.max_model_len = 80;
  std::vector<Request> requests(3, GreedyRequest(Tokens("abcdefghijklmno"), 40));
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt[0] = static_cast<int32_t>(20 + i);
    requests[i].sampling.ignore_eos = true;
    requests[i].sampling.frequency_penalty = i == 1 ? 0.5f : 0.0f;
  }
  for (const bool caching : {false, true}) {
    options.enable_prefix_caching = caching;
    const auto gpu = RequireSameOnGpu(requests, options);
    CHECK(gpu->core->stats().num_preemptions_total > 0);
  }
}

TEST_CASE("the prefix cache holds tokens of answers only, however the answers end") {
  // With one token of prompt, the sixteenth is the fifteenth of the answer: the last of a block.
  for (const size_t length : {13, 14, 15, 16, 30, 31}) {
    CAPTURE(length);
    std::vector<int32_t> script(length);
    for (size_t i = 0; i < length; ++i) script[i] = static_cast<int32_t>(1 + i % 26);
    SteppedEngine gpu(Device::kCuda, SmallOptions(), Says(script, 1));
    SteppedEngine cpu(Device::kCpu, SmallOptions(), Says(script, 1));
    const Request first = GreedyRequest(Tokens("z"), 100);
    const auto text = gpu.Add(first);
    gpu.Finish();
    CHECK(text->output().tokens.size() == length + 1);  // with the end of sequence
    // Says goes on with ends of sequence, so that is what the surplus row drew.
    Request next = GreedyRequest(Tokens("z"), 3);
    next.prompt.insert(next.prompt.end(), script.begin(), script.end());
    next.prompt.resize(40, testing::FakeTokenizer::kEos);
    next.sampling.ignore_eos = true;
    const auto again = gpu.Add(next);
    gpu.Finish();
    const auto alone = cpu.Add(next);
    cpu.Finish();
    RequireSame(*again, *alone);
    // Of the text and its end, the full blocks.
    CHECK(again->Wait().cached_tokens == static_cast<int>(length + 2) / 16 * 16);
  }
}

}  // namespace
}  // namespace gloam
