// The engine without its thread: every interleaving here is chosen by the seed, and the books are
// checked after each operation.
#include "engine/engine_core.h"

#include <random>

#include "catch2/catch.hpp"
#include "tests/engine/engine_fixture.h"

namespace gloam {
namespace {

using testing::CollectingSink;
using testing::FakeModel;
using testing::GreedyRequest;
using testing::SmallOptions;

TEST_CASE("random requests, cancellations, deadlines, full sinks and steps") {
  int num_operations = 0;
  int64_t num_preemptions = 0;
  int num_complete = 0;
  for (uint32_t seed = 1; seed <= 100; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
    testing::FakeOps ops(seed % 2 == 0 ? Device::kCpu : Device::kCuda);
    testing::FakeTokenizer tokenizer;
    MetricsRegistry metrics("fake");
    EngineOptions options = SmallOptions();
    options.max_model_len = 96;
    options.num_kv_blocks = 6 + draw(12);
    options.max_num_seqs = 1 + draw(8);
    options.max_num_batched_tokens = 1 + draw(40);
    options.enable_prefix_caching = draw(4) != 0;
    auto model = std::make_unique<FakeModel>();
    model->ops = &ops;
    const auto core =
        EngineCore::Create(options, ops, std::move(model), tokenizer, metrics).value();

    // Deadlines and "now" come from a clock of the test's own.
    const EngineCore::Clock::time_point start = EngineCore::Clock::now();
    const auto at = [start](int operation) { return start + std::chrono::hours(operation); };
    struct Sent {
      Request request;
      std::shared_ptr<CollectingSink> sink;
    };
    std::vector<Sent> sent;
    for (int operation = 0; operation < 250 || core->HasWork(); ++operation) {
      ++num_operations;
      REQUIRE(operation < 20000);
      const int choice = operation < 250 ? draw(8) : 7;
      if (choice == 0) {
        Request request = GreedyRequest(std::vector<int32_t>(16 * draw(4), 1 + draw(2)), 30);
        for (int i = 0, n = 1 + draw(16); i < n; ++i) request.prompt.push_back(draw(60));
        request.sampling.max_tokens = draw(30);
        request.sampling.ignore_eos = draw(2) == 0;
        if (draw(5) == 0) request.sampling.num_prompt_logprobs = 0;
        if (draw(6) == 0) request.deadline = at(operation + 1 + draw(40));
        request.n = 1 + (draw(3) == 0 ? draw(3) : 0);
        request.priority = draw(2);
        const int max_deltas = draw(8) == 0 ? draw(6) : 1 << 20;
        sent.push_back({request, std::make_shared<CollectingSink>(request.n, max_deltas)});
        core->Add(sent.size(), request, sent.back().sink, start);
      } else if (choice == 1 && !sent.empty()) {
        core->Cancel(static_cast<RequestHandle>(draw(static_cast<int>(sent.size()) + 2)));
      } else if (choice == 2) {
        core->ExpireDeadlines(at(operation));
      } else {
        core->Step();
      }
      const Status status = core->CheckIntegrity();
      INFO(status.ToString());
      REQUIRE(status.ok());
    }

    for (const Sent& entry : sent) {
      REQUIRE(entry.sink->ended());
      for (int i = 0; i < entry.request.n; ++i) {
        const CollectingSink::Output& output = entry.sink->output(i);
        if (output.finish_reason == FinishReason::kLength) {
          ++num_complete;
          CHECK(static_cast<int>(output.tokens.size()) == *entry.request.sampling.max_tokens);
        }
      }
    }
    const EngineStats stats = core->stats();
    CHECK(stats.num_blocks_in_use == 0);
    CHECK(stats.num_running + stats.num_waiting == 0);
    CHECK(core->num_requests_started() == static_cast<int64_t>(sent.size()));
    CHECK(core->num_requests_ended() == static_cast<int64_t>(sent.size()));
    num_preemptions += stats.num_preemptions_total;
  }
  CHECK(num_operations > 25000);
  CHECK(num_preemptions > 50);
  CHECK(num_complete > 300);
}

}  // namespace
}  // namespace gloam
