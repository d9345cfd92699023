#include "engine/scheduler.h"

#include <algorithm>
#include <memory>
#include <random>
#include <set>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

std::unique_ptr<Sequence> MakeSequence(uint64_t arrival, int num_tokens, int priority = 0,
                                       int32_t first_token = -1) {
  auto sequence = std::make_unique<Sequence>();
  sequence->order = {.priority = priority, .arrival = arrival};
  for (int i = 0; i < num_tokens; ++i) {
    sequence->tokens.push_back((first_token >= 0 ? first_token : static_cast<int>(arrival) * 1000) +
                               i);
  }
  sequence->num_prompt_tokens = num_tokens;
  return sequence;
}

void RequireIntegrity(const Scheduler& scheduler) {
  const Status status = scheduler.CheckIntegrity();
  INFO(status.ToString());
  REQUIRE(status.ok());
}

// Runs the plan as an engine would: a token is appended wherever one is drawn.
void RunStep(Scheduler& scheduler, const StepPlan& plan) {
  scheduler.Advance();
  for (const ScheduledSequence& scheduled : plan.sequences) {
    if (scheduled.samples) scheduled.sequence->tokens.push_back(7);
  }
  RequireIntegrity(scheduler);
}

TEST_CASE("prompts are cut into chunks under the token budget; decoding goes on beside them") {
  Scheduler scheduler({.max_num_seqs = 4, .max_num_batched_tokens = 10, .num_blocks = 100});
  const auto a = MakeSequence(1, 4);
  const auto b = MakeSequence(2, 25);
  scheduler.Add(*a);
  scheduler.Add(*b);
  const StepPlan& plan = scheduler.Schedule();
  REQUIRE(plan.sequences.size() == 2);
  CHECK(plan.sequences[0].num_tokens == 4);
  CHECK(plan.sequences[0].samples);
  CHECK(plan.sequences[1].num_tokens == 6);
  CHECK_FALSE(plan.sequences[1].samples);
  CHECK(plan.num_sample_rows == 1);
  RunStep(scheduler, plan);

  scheduler.Schedule();
  REQUIRE(plan.sequences.size() == 2);
  CHECK(plan.sequences[0].num_tokens == 1);
  CHECK(plan.sequences[1].num_tokens == 9);
  RunStep(scheduler, plan);
  scheduler.Schedule();
  CHECK(plan.sequences[1].num_tokens == 9);
  RunStep(scheduler, plan);
  scheduler.Schedule();
  CHECK(plan.sequences[1].num_tokens == 1);
  CHECK(plan.sequences[1].samples);
}

TEST_CASE("a long prompt that came first does not stop later ones from decoding") {
  Scheduler scheduler({.max_num_seqs = 4, .max_num_batched_tokens = 8, .num_blocks = 100});
  const auto a = MakeSequence(1, 2, /*priority=*/5);
  scheduler.Add(*a);
  RunStep(scheduler, scheduler.Schedule());
  const auto b = MakeSequence(2, 1000, /*priority=*/1);
  scheduler.Add(*b);
  for (int step = 0; step < 20; ++step) {
    const StepPlan& plan = scheduler.Schedule();
    REQUIRE(plan.sequences.size() == 2);
    CHECK(plan.num_tokens == 8);
    CHECK(std::any_of(plan.sequences.begin(), plan.sequences.end(),
                      [&](const auto& s) { return s.sequence == a.get() && s.samples; }));
    RunStep(scheduler, plan);
  }
}

TEST_CASE("a step in which a sequence decodes may have fewer tokens") {
  Scheduler scheduler({.max_num_seqs = 4,
                       .max_num_batched_tokens = 16,
                       .max_tokens_beside_decode = 8,
                       .num_blocks = 100});
  const auto a = MakeSequence(1, 20);
  const auto b = MakeSequence(2, 100);
  scheduler.Add(*a);
  scheduler.Add(*b);
  for (const int num_tokens : {16, 16, 8, 8}) {  // from the third on `a` decodes
    const StepPlan& plan = scheduler.Schedule();
    CHECK(plan.num_tokens == num_tokens);
    RunStep(scheduler, plan);
  }
  scheduler.Remove(*a);
  CHECK(scheduler.Schedule().num_tokens == 16);
}

TEST_CASE("lower priority values first, then first come") {
  Scheduler scheduler({.max_num_seqs = 1, .max_num_batched_tokens = 8, .num_blocks = 10});
  const auto a = MakeSequence(1, 4, 1);
  const auto b = MakeSequence(2, 4, 0);
  const auto c = MakeSequence(3, 4, 0);
  for (Sequence* sequence : {a.get(), c.get(), b.get()}) scheduler.Add(*sequence);
  std::vector<Sequence*> order;
  while (scheduler.HasWork()) {
    const StepPlan& plan = scheduler.Schedule();
    REQUIRE(plan.sequences.size() == 1);
    order.push_back(plan.sequences[0].sequence);
    RunStep(scheduler, plan);
    scheduler.Remove(*order.back());
  }
  CHECK(order == std::vector<Sequence*>{b.get(), c.get(), a.get()});
}

TEST_CASE("when blocks run out the last in order waits again, and finds its blocks") {
  Scheduler scheduler({.max_num_seqs = 4, .max_num_batched_tokens = 64, .num_blocks = 4});
  const auto a = MakeSequence(1, 31);
  const auto b = MakeSequence(2, 32);
  scheduler.Add(*a);
  scheduler.Add(*b);
  const StepPlan& plan = scheduler.Schedule();
  REQUIRE(plan.sequences.size() == 2);
  RunStep(scheduler, plan);
  scheduler.Schedule();  // b needs a third block
  CHECK(plan.num_preempted == 1);
  REQUIRE(plan.sequences.size() == 1);
  CHECK(plan.sequences[0].sequence == a.get());
  CHECK(b->state == SequenceState::kWaiting);
  CHECK(scheduler.num_preemptions() == 1);
  RunStep(scheduler, plan);
  scheduler.Remove(*a);
  scheduler.Schedule();
  REQUIRE(plan.sequences.size() == 1);
  CHECK(plan.sequences[0].sequence == b.get());
  CHECK(b->num_computed == 32);  // all of its prompt was still there
  CHECK(plan.sequences[0].num_tokens == 1);
  RunStep(scheduler, plan);
  scheduler.Remove(*b);
  CHECK(scheduler.blocks().num_in_use() == 0);
}

TEST_CASE("prompt scores: every prompt token once, in chunks of the score budget") {
  Scheduler scheduler(
      {.max_num_seqs = 2, .max_num_batched_tokens = 16, .max_score_rows = 5, .num_blocks = 10});
  const auto a = MakeSequence(1, 12);
  const auto warm = MakeSequence(0, 20, 0, 1000);
  a->tokens.assign(warm->tokens.begin(), warm->tokens.begin() + 12);
  a->tokens.resize(20, 5);
  a->num_prompt_tokens = 20;
  a->wants_prompt_scores = true;
  scheduler.Add(*a);
  std::vector<int> scored;
  while (a->tokens.size() == 20) {
    const StepPlan& plan = scheduler.Schedule();
    REQUIRE(plan.sequences.size() == 1);
    CHECK(plan.num_score_rows <= 5);
    const ScheduledSequence& scheduled = plan.sequences[0];
    for (int i = 0; i < scheduled.num_score_rows; ++i) {
      scored.push_back(a->num_computed + scheduled.first_score_row + i + 1);
    }
    RunStep(scheduler, plan);
  }
  std::vector<int> expected;
  for (int i = 1; i < 20; ++i) expected.push_back(i);
  CHECK(scored == expected);
}

TEST_CASE("a request that wants prompt scores does not read the prefix cache") {
  Scheduler scheduler({.max_num_seqs = 2, .max_num_batched_tokens = 64, .num_blocks = 20});
  const auto a = MakeSequence(1, 40, 0, 100);
  const auto b = MakeSequence(2, 40, 0, 100);
  const auto c = MakeSequence(3, 40, 0, 100);
  b->wants_prompt_scores = true;
  scheduler.Add(*a);
  RunStep(scheduler, scheduler.Schedule());
  scheduler.Remove(*a);
  scheduler.Add(*b);
  RunStep(scheduler, scheduler.Schedule());
  CHECK(b->num_cached_tokens == 0);
  scheduler.Remove(*b);
  scheduler.Add(*c);
  RunStep(scheduler, scheduler.Schedule());
  CHECK(c->num_cached_tokens == 32);
}

TEST_CASE("random arrivals, removals and steps keep the books right, and everyone finishes") {
  int64_t num_preemptions = 0;
  int64_t num_hits = 0;
  int num_operations = 0;
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
    SchedulerOptions options;
    options.max_num_seqs = 1 + draw(8);
    options.max_num_batched_tokens = options.max_num_seqs + draw(60);
    options.max_tokens_beside_decode =
        std::min(options.max_num_seqs + draw(60), options.max_num_batched_tokens);
    options.max_score_rows = 1 + draw(20);
    options.num_blocks = 6 + draw(12);
    options.enable_prefix_caching = seed % 4 != 0;
    Scheduler scheduler(options);
    struct Live {
      std::unique_ptr<Sequence> sequence;
      int max_tokens;
    };
    std::vector<Live> live;
    const auto finish = [&](size_t i) {
      scheduler.Remove(*live[i].sequence);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    };
    uint64_t arrival = 0;
    int steps_left = 100000;
    for (int operation = 0; operation < 400 || !live.empty(); ++operation) {
      ++num_operations;
      const int choice = operation < 400 ? draw(8) : 7;
      if (choice < 2) {
        auto sequence = MakeSequence(++arrival, 1 + draw(60), draw(3), draw(2) * 500);
        sequence->wants_prompt_scores = draw(5) == 0;
        const int max_tokens = static_cast<int>(sequence->tokens.size()) + 1 + draw(30);
        scheduler.Add(*sequence);
        live.push_back({std::move(sequence), max_tokens});
      } else if (choice == 2 && !live.empty()) {
        finish(static_cast<size_t>(draw(static_cast<int>(live.size()))));
      } else {
        REQUIRE(--steps_left > 0);
        const bool has_work = scheduler.HasWork();
        const bool decodes = std::any_of(live.begin(), live.end(), [](const Live& entry) {
          const Sequence& s = *entry.sequence;
          return s.state == SequenceState::kRunning && s.num_pending() == 1;
        });
        const StepPlan& plan = scheduler.Schedule();
        RequireIntegrity(scheduler);
        CHECK(plan.sequences.empty() == !has_work);
        std::set<Sequence*> seen;
        int num_tokens = 0;
        for (const ScheduledSequence& scheduled : plan.sequences) {
          REQUIRE(seen.insert(scheduled.sequence).second);
          REQUIRE(scheduled.num_tokens >= 1);
          REQUIRE(scheduled.samples == (scheduled.num_tokens == scheduled.sequence->num_pending()));
          num_tokens += scheduled.num_tokens;
        }
        REQUIRE(num_tokens == plan.num_tokens);
        REQUIRE(num_tokens <=
                (decodes ? options.max_tokens_beside_decode : options.max_num_batched_tokens));
        REQUIRE(plan.num_score_rows <= options.max_score_rows);
        REQUIRE(static_cast<int>(seen.size()) <= options.max_num_seqs);
        for (const Live& entry : live) {  // whoever decodes is in every step
          const Sequence& s = *entry.sequence;
          if (s.state == SequenceState::kRunning && s.num_pending() == 1) {
            REQUIRE(seen.contains(entry.sequence.get()));
          }
        }
        RunStep(scheduler, plan);
        for (size_t i = live.size(); i-- > 0;) {
          const Sequence& s = *live[i].sequence;
          if (static_cast<int>(s.tokens.size()) < live[i].max_tokens) continue;
          if (s.wants_prompt_scores) REQUIRE(s.num_scored == s.num_prompt_tokens);
          finish(i);
        }
      }
      RequireIntegrity(scheduler);
    }
    CHECK(scheduler.blocks().num_in_use() == 0);
    num_preemptions += scheduler.num_preemptions();
    num_hits += scheduler.num_prefix_hits();
  }
  CHECK(num_operations > 80000);
  CHECK(num_preemptions > 500);
  CHECK(num_hits > 5000);
}

TEST_CASE("Sparse tokens never share a step with dense ones, voting tokens stay together") {
  std::mt19937 random(99);
  const SparsityPolicy policy;
  for (int round = 0; round < 300; ++round) {
    CAPTURE(round);
    const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
    const int window = 1 + draw(12);
    SchedulerOptions options;
    options.num_blocks = 64;
    options.max_num_seqs = 4;
    options.max_num_batched_tokens = window + 4 + draw(40);
    Scheduler scheduler(options);
    std::vector<std::unique_ptr<Sequence>> sequences;
    for (int i = 0; i < 4; ++i) {
      auto sequence = std::make_unique<Sequence>();
      sequence->order.arrival = i;
      sequence->tokens.assign(window + 1 + draw(80), 7);
      sequence->num_prompt_tokens = static_cast<int>(sequence->tokens.size());
      sequence->policy = &policy;
      sequence->num_dense_prompt_tokens = window + draw(sequence->num_prompt_tokens - window) + 1;
      sequence->first_sparse_token = sequence->num_dense_prompt_tokens + draw(2) * draw(9);
      sequence->vote_begin = sequence->num_dense_prompt_tokens - window;
      if (draw(2) == 0) sequence->compressed = std::make_unique<CompressedPrompt>();
      scheduler.Add(*sequence);
      sequences.push_back(std::move(sequence));
    }
    for (int step = 0; scheduler.HasWork(); ++step) {
      REQUIRE(step < 500);
      const StepPlan& plan = scheduler.Schedule();
      REQUIRE(!plan.sequences.empty());
      for (const ScheduledSequence& scheduled : plan.sequences) {
        const Sequence& s = *scheduled.sequence;
        const int begin = s.num_computed;
        const int end = begin + scheduled.num_tokens;
        REQUIRE((end <= s.first_sparse_token || begin >= s.first_sparse_token));
        REQUIRE(static_cast<int>(s.table.num_committed) * kBlockTokens <= s.first_sparse_token);
        if (s.compressed) {
          const bool some = begin < s.num_dense_prompt_tokens && end > s.vote_begin;
          const bool all = begin <= s.vote_begin && end >= s.num_dense_prompt_tokens;
          REQUIRE((!some || all));
        }
      }
      scheduler.Advance();
      REQUIRE(scheduler.CheckIntegrity().ok());
      for (const auto& sequence : sequences) {
        if (sequence->state == SequenceState::kRunning && sequence->num_pending() == 0) {
          scheduler.Remove(*sequence);
        }
      }
    }
  }
}

}  // namespace
}  // namespace gloam
