// Random mixes of requests: whatever the batch, the chunks, the cache, pre-emption and cancelled
// neighbours, an answer is the same as alone.
#include <algorithm>
#include <random>

#include "catch2/catch.hpp"
#include "kernels/selector.h"
#include "tests/engine/engine_fixture.h"

namespace gloam {
namespace {

using testing::CollectingSink;
using testing::FakeModel;
using testing::SmallOptions;
using testing::TestEngine;

// Sparse from some position on, with or without a compressor; recent_tokens tells policies apart.
void AddPolicy(std::mt19937& random, Request& request) {
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  auto policy = std::make_shared<SparsityPolicy>();
  policy->selector.selector = FindSelector("none");
  policy->recent_tokens = 1 + draw(3);
  policy->bypass_below_tokens = draw(3) == 0 ? draw(60) : 0;
  policy->skip_first_two_layers = draw(2) == 0;
  if (draw(3) == 0 && request.sampling.num_prompt_logprobs < 0) {
    policy->compressor.type = CompressorType::kSnapKv;
    policy->compressor.window_size = 1;
    policy->compressor.max_capacity_prompt = 1 + draw(20);
  }
  request.num_decoded_prompt_tokens = draw(static_cast<int>(request.prompt.size()));
  request.sparsity = std::move(policy);
}

// Requests whose prompts share beginnings; greedy, or seeded.
std::vector<Request> MakeRequests(std::mt19937& random, int count, bool with_policies = true) {
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request request;
    for (int block = 0, n = draw(4); block < n; ++block) {
      request.prompt.insert(request.prompt.end(), kBlockTokens, 1 + draw(2));
    }
    for (int j = 0, n = 1 + draw(20); j < n; ++j) request.prompt.push_back(draw(60));
    request.sampling.temperature = i % 3 == 2 ? 1.0f : 0.0f;
    request.sampling.seed = random();
    request.sampling.max_tokens = 1 + draw(40);
    request.sampling.ignore_eos = draw(2) == 0;
    request.sampling.min_tokens = draw(3);
    if (draw(3) == 0) request.sampling.stop = {"a", "<40>", "<5"};
    if (draw(4) == 0) request.sampling.num_logprobs = 1;
    if (draw(4) == 0) request.sampling.num_prompt_logprobs = 0;
    if (draw(4) == 0) request.sampling.frequency_penalty = 0.5f;
    if (draw(4) == 0) request.n = 2 + draw(2);
    if (with_policies && draw(2) == 0) AddPolicy(random, request);
    request.priority = draw(3);
    requests.push_back(std::move(request));
  }
  return requests;
}

void RequireSame(const CollectingSink& sink, const CollectingSink& alone, int n) {
  for (int i = 0; i < n; ++i) {
    REQUIRE(sink.output(i).tokens == alone.output(i).tokens);
    REQUIRE(sink.output(i).text == alone.output(i).text);
    REQUIRE(sink.output(i).finish_reason == alone.output(i).finish_reason);
    REQUIRE(sink.output(i).stop_reason == alone.output(i).stop_reason);
    REQUIRE(sink.output(i).logprobs.size() == alone.output(i).logprobs.size());
  }
  REQUIRE(sink.prompt_logprobs().size() == alone.prompt_logprobs().size());
  for (size_t i = 0; i < sink.prompt_logprobs().size(); ++i) {
    REQUIRE(sink.prompt_logprobs()[i].logprob.logprob ==
            alone.prompt_logprobs()[i].logprob.logprob);
  }
}

// What the requests give alone on the CPU, they give in any company on `device`.
void CheckMixes(Device device) {
  constexpr int kMaxModelLen = 112;
  std::mt19937 random(20240607);
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  const std::vector<Request> requests = MakeRequests(random, 60, device == Device::kCpu);

  std::vector<std::shared_ptr<CollectingSink>> alone;
  {
    EngineOptions options = SmallOptions();
    options.max_model_len = kMaxModelLen;
    options.max_num_batched_tokens = 512;
    options.enable_prefix_caching = false;
    TestEngine engine(options);
    for (const Request& request : requests) alone.push_back(engine.Run(request));
  }

  int64_t num_preemptions = 0;
  int64_t num_hits = 0;
  for (int mix = 0; mix < 200; ++mix) {
    CAPTURE(mix);
    EngineOptions options = SmallOptions();
    options.max_model_len = kMaxModelLen;
    options.num_kv_blocks = kMaxModelLen / kBlockTokens + draw(8);
    options.max_num_batched_tokens = 1 + draw(mix % 2 == 0 ? 12 : 100);
    options.max_num_seqs = 1 + draw(12);
    options.enable_prefix_caching = draw(4) != 0;
    TestEngine engine(options, {}, device);
    std::vector<std::pair<size_t, std::shared_ptr<CollectingSink>>> running;
    for (int i = 0, n = 2 + draw(24); i < n; ++i) {
      const size_t which = static_cast<size_t>(draw(static_cast<int>(requests.size())));
      const auto sink = std::make_shared<CollectingSink>(requests[which].n);
      const RequestHandle handle = engine->Submit(requests[which], sink).value();
      if (draw(6) == 0) sink->WaitForDeltas(1);
      if (draw(6) == 0) {
        engine->Cancel(handle);
      } else {
        running.emplace_back(which, sink);
      }
    }
    for (const auto& [which, sink] : running) {
      sink->Wait();
      RequireSame(*sink, *alone[which], requests[which].n);
    }
    engine->Drain(std::chrono::steady_clock::now() + std::chrono::minutes(1));
    const EngineStats stats = engine->stats();
    REQUIRE(stats.num_blocks_in_use == 0);
    REQUIRE(stats.num_running + stats.num_waiting == 0);
    num_preemptions += stats.num_preemptions_total;
    num_hits += stats.prefix_cache_hits;
  }
  INFO(num_preemptions << " pre-emptions, " << num_hits << " tokens found in the cache");
  CHECK(num_preemptions > 200);
  CHECK(num_hits > 5000);
}

TEST_CASE("200 random mixes give the answers that the requests give alone") {
  CheckMixes(Device::kCpu);
}
TEST_CASE("200 random mixes on a GPU give the answers that the requests give alone on the CPU") {
  CheckMixes(Device::kCuda);
}

TEST_CASE("500 cancellations at random moments leave no block in use") {
  std::mt19937 random(7);
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  std::vector<Request> requests = MakeRequests(random, 40);
  EngineOptions options = SmallOptions();
  options.max_model_len = 112;
  options.num_kv_blocks = 24;
  options.max_num_batched_tokens = 24;
  TestEngine engine(options);
  int num_cancelled = 0;
  int num_finished = 0;
  for (int round = 0; round < 50; ++round) {
    CAPTURE(round);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    std::vector<int> counts;
    for (int i = 0; i < 10; ++i) {
      const Request& request = requests[static_cast<size_t>(draw(40))];
      sinks.push_back(std::make_shared<CollectingSink>(request.n));
      counts.push_back(request.n);
      const RequestHandle handle = engine->Submit(request, sinks.back()).value();
      // Queued, in prefill, in decode, or about to end.
      if (draw(2) == 0) sinks[static_cast<size_t>(draw(i + 1))]->WaitForDeltas(draw(12));
      engine->Cancel(handle);
    }
    for (size_t i = 0; i < sinks.size(); ++i) {
      sinks[i]->Wait();
      for (int answer = 0; answer < counts[i]; ++answer) {
        REQUIRE(sinks[i]->output(answer).finish_reason);
        const bool cancelled = sinks[i]->output(answer).finish_reason == FinishReason::kCancelled;
        num_cancelled += cancelled;
        num_finished += !cancelled;
      }
    }
    const EngineStats stats = engine->stats();
    REQUIRE(stats.num_blocks_in_use == 0);
    REQUIRE(stats.num_running + stats.num_waiting == 0);
  }
  CHECK(num_cancelled > 200);
  CHECK(num_finished > 20);
}

}  // namespace
}  // namespace gloam
