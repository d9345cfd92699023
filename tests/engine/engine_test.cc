#include "engine/engine.h"

#include <atomic>
#include <set>
#include <stdexcept>

#include "catch2/catch.hpp"
#include "tests/engine/engine_fixture.h"

namespace gloam {
namespace {

using testing::CollectingSink;
using testing::FakeModel;
using testing::FakeTokenizer;
using testing::Gate;
using testing::GreedyRequest;
using testing::Says;
using testing::SmallOptions;
using testing::TestEngine;
using testing::Tokens;
using Clock = std::chrono::steady_clock;

std::function<void(FakeModel&)> Through(Gate& gate) {
  return [&gate](FakeModel& model) { model.on_forward = [&gate](const auto&) { gate.Pass(); }; };
}

StatusCode CodeOf(const StatusOr<RequestHandle>& handle) { return handle.status().code(); }

TEST_CASE("an answer streams and ends with end-of-sequence") {
  TestEngine engine(SmallOptions(), Says(Tokens("hello"), 3));
  const auto sink = engine.Run(GreedyRequest(Tokens("abc"), 20));
  CHECK(sink->output().text == "hello");
  CHECK(sink->output().tokens == std::vector<int32_t>{8, 5, 12, 12, 15, 0});
  CHECK(sink->output().finish_reason == FinishReason::kStop);
  CHECK_FALSE(sink->output().stop_reason);
  CHECK(sink->output().pieces.size() == 6);
  const RequestSummary summary = sink->Wait();
  CHECK(summary.prompt_tokens == 3);
  CHECK(summary.completion_tokens == 6);
  CHECK(summary.cached_tokens == 0);
  const EngineStats stats = engine->stats();
  CHECK(stats.num_blocks_in_use == 0);
  CHECK(stats.prompt_tokens_total == 3);
  CHECK(stats.generation_tokens_total == 6);
}

TEST_CASE("max_tokens, the end of the context, and no tokens at all") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  EngineOptions options = SmallOptions();
  options.max_model_len = 20;
  TestEngine engine(options, Says(Tokens("abcdefghijklmnopqrstuvwxyz"), 10), device);
  auto sink = engine.Run(GreedyRequest(Tokens("abcdefghij"), 4));
  CHECK(sink->output().text == "abcd");
  CHECK(sink->output().finish_reason == FinishReason::kLength);

  Request request = GreedyRequest(Tokens("abcdefghij"), 4);
  request.sampling.max_tokens.reset();
  sink = engine.Run(request);
  CHECK(sink->output().text == "abcdefghij");
  CHECK(sink->output().finish_reason == FinishReason::kLength);

  sink = engine.Run(GreedyRequest(Tokens("abcdefghij"), 0));
  CHECK(sink->output().tokens.empty());
  CHECK(sink->output().finish_reason == FinishReason::kLength);
}

TEST_CASE("a stop string over token borders") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), Says(Tokens("say the end now"), 1), device);
  Request request = GreedyRequest(Tokens("a"), 30);
  request.sampling.stop = {"zz", "end"};
  auto sink = engine.Run(request);
  CHECK(sink->output().text == "say the ");
  CHECK(sink->output().tokens == Tokens("say the end"));
  CHECK(sink->output().finish_reason == FinishReason::kStop);
  CHECK(sink->output().stop_reason == "end");
  for (const std::string& piece : sink->output().pieces) {
    CHECK(piece.find("en") == std::string::npos);
  }

  request.sampling.include_stop_str_in_output = true;
  CHECK(engine.Run(request)->output().text == "say the end");

  request.sampling.stop = {"now!"};  // held back, then not a stop after all
  sink = engine.Run(request);
  CHECK(sink->output().text == "say the end now");
  CHECK_FALSE(sink->output().stop_reason);

  request.sampling.stop = {"end"};
  request.sampling.max_tokens = 11;  // the stop string and the length at once
  CHECK(engine.Run(request)->output().finish_reason == FinishReason::kStop);
}

TEST_CASE("stop tokens give their id and no text") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), Says(Tokens("abcdef"), 1), device);
  Request request = GreedyRequest(Tokens("a"), 30);
  request.sampling.stop_token_ids = {4};
  auto sink = engine.Run(request);
  CHECK(sink->output().text == "abc");
  CHECK(sink->output().tokens == Tokens("abcd"));
  CHECK(sink->output().stop_reason == "4");
  request.sampling.include_stop_str_in_output = true;
  CHECK(engine.Run(request)->output().text == "abcd");
}

TEST_CASE("min_tokens forbids ending, ignore_eos goes past it") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), Says(Tokens("ab"), 1), device);
  Request request = GreedyRequest(Tokens("a"), 8);
  request.sampling.min_tokens = 5;
  auto sink = engine.Run(request);
  CHECK(sink->output().tokens.size() == 6);
  CHECK(sink->output().tokens.back() == FakeTokenizer::kEos);
  for (int i = 0; i < 5; ++i) CHECK(sink->output().tokens[i] != FakeTokenizer::kEos);

  request.sampling.min_tokens = 0;
  request.sampling.ignore_eos = true;
  sink = engine.Run(request);
  CHECK(sink->output().tokens.size() == 8);
  CHECK(sink->output().finish_reason == FinishReason::kLength);
}

TEST_CASE("characters arrive whole, with all of their tokens") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), Says({1, 28, 29, 2, 28}, 1), device);
  const auto sink = engine.Run(GreedyRequest(Tokens("a"), 30));
  REQUIRE(sink->output().pieces.size() == 4);
  CHECK(sink->output().pieces[0] == "a");
  CHECK(sink->output().pieces[1] == "\xC3\xA9");
  CHECK(sink->output().pieces[2] == "b");
  CHECK(sink->output().pieces[3] == "\xEF\xBF\xBD");  // half a character at the end
  CHECK(sink->output().tokens == std::vector<int32_t>{1, 28, 29, 2, 28, 0});
}

TEST_CASE("log-probabilities come one per token") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), {}, device);
  Request request = GreedyRequest(Tokens("abcdefgh"), 6);
  request.sampling.num_logprobs = 2;
  request.sampling.ignore_eos = true;
  request.sampling.stop = {"qqqqqqq"};
  const auto sink = engine.Run(request);
  REQUIRE(sink->output().logprobs.size() == 6);
  for (int i = 0; i < 6; ++i) {
    CHECK(sink->output().logprobs[i].token == sink->output().tokens[i]);
    CHECK(sink->output().logprobs[i].top.size() == 2);
  }
}

TEST_CASE("prompt log-probabilities: one per prompt token, whatever the chunks, cache or n") {
  EngineOptions options = SmallOptions();
  const std::vector<int32_t> prompt = Tokens("the quick brown fox jumps over the lazy dog again");
  Request request = GreedyRequest(prompt, 2);
  request.sampling.num_prompt_logprobs = 1;
  std::vector<float> expected;
  for (int budget : {64, 7, 1}) {
    options.max_num_batched_tokens = budget;
    TestEngine engine(options);
    engine.Run(GreedyRequest(prompt, 2));  // fills the prefix cache
    for (int n : {1, 3}) {
      request.n = n;
      const auto sink = engine.Run(request);
      REQUIRE(sink->prompt_logprobs().size() == prompt.size());
      std::vector<float> values;
      for (size_t i = 0; i < prompt.size(); ++i) {
        CHECK(sink->prompt_logprobs()[i].token == prompt[i]);
        CHECK(sink->prompt_logprobs()[i].top.size() == (i == 0 ? 0 : 1));
        values.push_back(sink->prompt_logprobs()[i].logprob.logprob);
      }
      CHECK(sink->prompt_logprobs()[0].logprob.rank == 0);
      if (expected.empty()) expected = values;
      CHECK(values == expected);
    }
  }
}

TEST_CASE("a prompt that was seen is not computed again") {
  TestEngine engine;
  const std::vector<int32_t> prompt(40, 3);
  const auto first = engine.Run(GreedyRequest(prompt, 5));
  const auto second = engine.Run(GreedyRequest(prompt, 5));
  CHECK(first->Wait().cached_tokens == 0);
  CHECK(second->Wait().cached_tokens == 32);
  CHECK(first->output().tokens == second->output().tokens);
  const EngineStats stats = engine->stats();
  CHECK(stats.prefix_cache_queries == 80);
  CHECK(stats.prefix_cache_hits == 32);

  EngineOptions options = SmallOptions();
  options.enable_prefix_caching = false;
  TestEngine uncached(options);
  for (int i = 0; i < 2; ++i) {
    CHECK(uncached.Run(GreedyRequest(prompt, 5))->Wait().cached_tokens == 0);
  }
}

TEST_CASE("n answers: own seeds, repeatable, one computation of the prompt") {
  std::atomic<int> num_tokens = 0;
  TestEngine engine(SmallOptions(), [&](FakeModel& model) {
    model.on_forward = [&](const ForwardBatch& batch) { num_tokens += batch.seqs.num_tokens; };
  });
  Request request = GreedyRequest(std::vector<int32_t>(49, 2), 6);
  request.sampling.temperature = 1;
  request.sampling.ignore_eos = true;
  request.n = 4;
  request.sampling.seed = 11;
  num_tokens = 0;
  const auto a = engine.Run(request);
  CHECK(num_tokens == 49 + 3 + 4 * 5);
  const auto b = engine.Run(request);
  std::set<std::vector<int32_t>> distinct;
  for (int i = 0; i < 4; ++i) {
    CHECK(a->output(i).tokens == b->output(i).tokens);
    CHECK(a->output(i).tokens.size() == 6);
    distinct.insert(a->output(i).tokens);
  }
  CHECK(distinct.size() == 4);
  CHECK(a->Wait().completion_tokens == 24);
  CHECK(a->Wait().prompt_tokens == 49);

  request.n = 1;
  CHECK(engine.Run(request)->output().tokens == a->output(0).tokens);
  request.sampling.seed.reset();
  CHECK(engine.Run(request)->output().tokens != engine.Run(request)->output().tokens);

  EngineOptions options = SmallOptions();
  options.enable_prefix_caching = false;
  TestEngine uncached(options);
  request.n = 4;
  request.sampling.seed = 11;
  const auto c = uncached.Run(request);
  for (int i = 0; i < 4; ++i) CHECK(c->output(i).tokens == a->output(i).tokens);
}

TEST_CASE("penalties see what was generated, bias and bans reach the sampler") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), Says(std::vector<int32_t>(20, 5), 1), device);
  Request request = GreedyRequest(Tokens("a"), 10);
  CHECK(engine.Run(request)->output().text == "eeeeeeeeee");
  request.sampling.frequency_penalty = 2;  // the fake's favourite leads by ~100
  request.sampling.logit_bias = {{5, -96.5f}};
  const std::vector<int32_t> tokens = engine.Run(request)->output().tokens;
  REQUIRE(tokens.size() == 10);
  CHECK(tokens[0] == 5);
  CHECK(tokens[1] == 5);
  CHECK(std::count(tokens.begin(), tokens.end(), 5) < 4);
}

TEST_CASE("what cannot fit is refused, with what would") {
  EngineOptions options = SmallOptions();
  options.num_kv_blocks = 2;
  TestEngine engine(options);
  CHECK(engine->max_model_len() == 32);
  const auto submit = [&](std::vector<int32_t> prompt, int max_tokens) {
    return engine->Submit(GreedyRequest(std::move(prompt), max_tokens),
                          std::make_shared<CollectingSink>());
  };
  const auto refused = submit(std::vector<int32_t>(32, 1), 5);
  CHECK(CodeOf(refused) == StatusCode::kInvalidArgument);
  CHECK(MessageOf(refused.status()).find("at most 32") != std::string::npos);
  CHECK(CodeOf(submit({}, 5)) == StatusCode::kInvalidArgument);
  CHECK(CodeOf(submit({FakeModel::kVocabSize}, 5)) == StatusCode::kInvalidArgument);
  CHECK(CodeOf(submit({-1}, 5)) == StatusCode::kInvalidArgument);

  Request longest = GreedyRequest(std::vector<int32_t>(31, 1), 5);
  CHECK(engine.Run(longest)->output().tokens.size() == 1);
  longest = GreedyRequest({1}, 1000);
  longest.sampling.ignore_eos = true;
  CHECK(engine.Run(longest)->output().tokens.size() == 31);  // the whole pool
}

TEST_CASE("the queue is bounded") {
  Gate gate;
  EngineOptions options = SmallOptions();
  options.max_num_seqs = 1;
  options.max_queued_requests = 3;
  TestEngine engine(options, Through(gate));
  gate.Close();
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  const auto submit = [&] {
    sinks.push_back(std::make_shared<CollectingSink>());
    return engine->Submit(GreedyRequest(Tokens("abc"), 3), sinks.back());
  };
  REQUIRE(submit().ok());
  gate.WaitForArrival(2);  // the warm-up was the first; this one runs and no longer waits
  gate.LetOnePass();
  gate.WaitForArrival(3);
  for (int i = 0; i < 3; ++i) REQUIRE(submit().ok());
  const auto refused = submit();
  CHECK(CodeOf(refused) == StatusCode::kResourceExhausted);
  CHECK(MessageOf(refused.status()).find("--max-queued-requests") != std::string::npos);
  sinks.pop_back();
  CHECK(engine->stats().num_waiting == 3);
  CHECK(engine->stats().num_running == 1);
  gate.Open();
  for (const auto& sink : sinks) sink->Wait();
  REQUIRE(submit().ok());
  sinks.back()->Wait();
}

TEST_CASE("cancelling frees the blocks within one step") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  Gate gate;
  TestEngine engine(SmallOptions(), Through(gate), device);
  Request endless = GreedyRequest(Tokens("abc"), 900);
  endless.sampling.ignore_eos = true;
  const auto bystander = std::make_shared<CollectingSink>();
  const RequestHandle bystander_handle = engine->Submit(endless, bystander).value();
  for (int num_deltas : {0, 1, 3}) {
    CAPTURE(num_deltas);
    Request request = endless;
    request.prompt.assign(200, 1);  // four chunks
    request.n = 2;
    const auto sink = std::make_shared<CollectingSink>(2);
    const RequestHandle handle = engine->Submit(request, sink).value();
    sink->WaitForDeltas(num_deltas);
    gate.Close();
    gate.WaitUntilHeld();
    const int num_before = gate.num_arrivals();
    engine->Cancel(handle);
    gate.LetOnePass();
    sink->Wait();
    CHECK(gate.num_arrivals() <= num_before + 1);
    CHECK(engine->stats().num_blocks_in_use <= 58);  // the bystander's alone
    CHECK(engine->stats().num_running <= 1);
    for (int i = 0; i < 2; ++i) {
      CHECK(sink->output(i).finish_reason == FinishReason::kCancelled);
    }
    gate.Open();
  }
  engine->Cancel(bystander_handle);
  engine->Cancel(bystander_handle);
  engine->Cancel(12345);
  bystander->Wait();
  CHECK(engine->stats().num_blocks_in_use == 0);
}

TEST_CASE("a sink that refuses is cancelled; the others go on") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  TestEngine engine(SmallOptions(), {}, device);
  Request request = GreedyRequest(Tokens("abc"), 20);
  request.sampling.ignore_eos = true;
  request.n = 3;
  const auto slow = std::make_shared<CollectingSink>(3, /*max_deltas=*/4);
  REQUIRE(engine->Submit(request, slow).ok());
  const auto other = engine.Run(request);
  slow->Wait();
  CHECK(slow->Wait().completion_tokens < 60);
  CHECK(other->output(2).tokens.size() == 20);
  CHECK(engine->stats().num_blocks_in_use == 0);
}

TEST_CASE("deadlines end requests that wait and requests that run") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  Gate gate;
  EngineOptions options = SmallOptions();
  options.max_num_seqs = 1;
  TestEngine engine(options, Through(gate), device);
  gate.Close();
  Request request = GreedyRequest(Tokens("abc"), 500);
  request.sampling.ignore_eos = true;
  // Long enough for a busy machine to begin the first request.
  request.deadline = Clock::now() + std::chrono::milliseconds(400);
  request.n = 2;
  const auto running = std::make_shared<CollectingSink>(2);
  const auto waiting = std::make_shared<CollectingSink>(2);
  REQUIRE(engine->Submit(request, running).ok());
  REQUIRE(engine->Submit(request, waiting).ok());
  gate.WaitForArrival(2);
  while (Clock::now() < *request.deadline) std::this_thread::yield();
  gate.Open();
  for (const auto& sink : {running, waiting}) {
    sink->Wait();
    for (int i = 0; i < 2; ++i) {
      CHECK(sink->output(i).finish_reason == FinishReason::kError);
      CHECK(sink->output(i).error.code() == StatusCode::kDeadlineExceeded);
    }
  }
  CHECK(MessageOf(running->output().error).find("running") != std::string::npos);
  CHECK(MessageOf(waiting->output().error).find("queue") != std::string::npos);
  CHECK(engine->stats().num_blocks_in_use == 0);
}

TEST_CASE("draining lets running requests finish and refuses new ones") {
  TestEngine engine;
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 12; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    REQUIRE(engine->Submit(GreedyRequest(Tokens("abc"), 30), sinks.back()).ok());
  }
  engine->Drain(Clock::now() + std::chrono::hours(1));
  for (const auto& sink : sinks) {
    CHECK(sink->ended());
    CHECK(sink->output().finish_reason != FinishReason::kCancelled);
  }
  CHECK(CodeOf(engine->Submit(GreedyRequest({1}, 1), sinks[0])) == StatusCode::kUnavailable);
  CHECK_FALSE(engine->failed());
  engine->Drain(Clock::now());
}

TEST_CASE("draining cancels what is left at the deadline") {
  TestEngine engine;
  Request request = GreedyRequest(Tokens("abc"), 100000);
  request.sampling.max_tokens.reset();
  request.sampling.ignore_eos = true;
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 20; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    REQUIRE(engine->Submit(request, sinks.back()).ok());
  }
  engine->Drain(Clock::now());
  int num_cancelled = 0;
  for (const auto& sink : sinks) {
    REQUIRE(sink->ended());
    num_cancelled += sink->output().finish_reason == FinishReason::kCancelled;
  }
  CHECK(num_cancelled > 0);
  CHECK(engine->stats().num_blocks_in_use == 0);
}

TEST_CASE("the destructor ends every request with an error") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  const auto sink = std::make_shared<CollectingSink>(2);
  {
    TestEngine engine(SmallOptions(), {}, device);
    Request request = GreedyRequest(Tokens("abc"), 100000);
    request.sampling.max_tokens.reset();
    request.sampling.ignore_eos = true;
    request.n = 2;
    REQUIRE(engine->Submit(request, sink).ok());
  }
  sink->Wait();
  CHECK(sink->output(1).finish_reason == FinishReason::kError);
  CHECK(sink->output(1).error.code() == StatusCode::kUnavailable);
}

TEST_CASE("a step that fails ends every request, and the engine says so") {
  const Device device = GENERATE(Device::kCpu, Device::kCuda);
  std::atomic<bool> fail = false;
  EngineOptions options = SmallOptions();
  options.max_num_seqs = 2;
  const auto failing = [&](FakeModel& model) {
    model.on_forward = [&](const auto&) {
      if (fail) throw std::runtime_error("device lost");
    };
  };
  TestEngine engine(options, failing, device);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  Request request = GreedyRequest(Tokens("abc"), 900);
  request.sampling.ignore_eos = true;
  for (int i = 0; i < 4; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    REQUIRE(engine->Submit(request, sinks.back()).ok());
  }
  sinks[0]->WaitForDeltas(1);
  CHECK_FALSE(engine->failed());
  fail = true;
  for (const auto& sink : sinks) {
    sink->Wait();
    CHECK(sink->output().finish_reason == FinishReason::kError);
    CHECK(sink->output().error.code() == StatusCode::kInternal);
  }
  CHECK(engine->failed());
  CHECK(CodeOf(engine->Submit(request, sinks[0])) == StatusCode::kUnavailable);
  CHECK(engine->stats().num_blocks_in_use == 0);
  engine->Drain(Clock::now() + std::chrono::hours(1));
}

TEST_CASE("Create names what is wrong") {
  testing::FakeOps ops;
  FakeTokenizer tokenizer;
  MetricsRegistry metrics("fake");
  const auto error_of = [&](const EngineOptions& options) {
    return MessageOf(
        Engine::Create(options, ops, std::make_unique<FakeModel>(), tokenizer, metrics).status());
  };
  EngineOptions options = SmallOptions();
  options.max_num_seqs = 0;
  CHECK(error_of(options).find("--max-num-seqs") != std::string::npos);
  options = SmallOptions();
  options.max_num_batched_tokens = 0;
  CHECK(error_of(options).find("--max-num-batched-tokens") != std::string::npos);
  options = SmallOptions();
  options.max_queued_requests = 0;
  CHECK(error_of(options).find("--max-queued-requests") != std::string::npos);
  options = SmallOptions();
  options.max_model_len = 2000;
  CHECK(error_of(options).find("--max-model-len") != std::string::npos);
}

TEST_CASE("metrics count answers, tokens and latencies") {
  TestEngine engine(SmallOptions(), Says(Tokens("hello"), 3));
  engine.Run(GreedyRequest(Tokens("abc"), 20));
  engine.Run(GreedyRequest(Tokens("abc"), 2));
  const std::string text = engine.metrics.Serialize();
  for (const char* line :
       {"gloam:prompt_tokens_total{model_name=\"fake\"} 6",
        "gloam:generation_tokens_total{model_name=\"fake\"} 8",
        "gloam:time_to_first_token_seconds_count{model_name=\"fake\"} 2",
        "gloam:inter_token_latency_seconds_count{model_name=\"fake\"} 6",
        "gloam:e2e_request_latency_seconds_count{model_name=\"fake\"} 2",
        "gloam:request_queue_time_seconds_count{model_name=\"fake\"} 2",
        "gloam:kv_cache_usage_perc{model_name=\"fake\"} 0",
        "gloam:request_success_total{model_name=\"fake\",finished_reason=\"stop\"} 1",
        "gloam:request_success_total{model_name=\"fake\",finished_reason=\"length\"} 1"}) {
    CAPTURE(line);
    CHECK(text.find(line) != std::string::npos);
  }
}

}  // namespace
}  // namespace gloam
