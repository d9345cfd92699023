// The engine on a device with memory of its own that repeats recorded steps: what it answers there
// is what it answers on the CPU.
#include <random>
#include <set>
#include <thread>

#include "catch2/catch.hpp"
#include "engine/staged_block_tables.h"
#include "engine/step_arrays.h"
#include "kernels/selector.h"
#include "tests/engine/engine_fixture.h"

namespace gloam {
namespace {

using testing::CollectingSink;
using testing::FakeModel;
using testing::FakeOps;
using testing::Gate;
using testing::GreedyRequest;
using testing::Says;
using testing::SmallOptions;
using testing::TestEngine;
using testing::Tokens;

TEST_CASE("padded sizes are few, never smaller, and close") {
  std::set<int> sizes;
  for (int n = 1; n <= 256; ++n) {
    const int padded = PaddedDecodeSeqs(n, 256);
    CHECK(padded >= n);
    CHECK(padded - n < std::max(n, 8));
    CHECK(PaddedDecodeSeqs(padded, 256) == padded);
    sizes.insert(padded);
  }
  CHECK(sizes.size() == 19);
  CHECK(PaddedDecodeSeqs(3, 3) == 3);
  CHECK(PaddedDecodeSeqs(65, 77) == 77);
  CHECK(PaddedDecodeSeqs(300, 1000) == 320);
}

TEST_CASE("step arrays do not overlap and lie where the shape says") {
  const StepShape shape = {.num_seqs = 5, .num_tokens = 37, .num_logit_rows = 3};
  const size_t bytes = StepArrays::At(nullptr, shape).bytes;
  std::vector<std::byte> memory(bytes);
  const StepArrays a = StepArrays::At(memory.data(), shape);
  CHECK(a.bytes == bytes);
  std::fill_n(a.token_ids, 37, 1);
  std::fill_n(a.positions, 37, 2);
  std::fill_n(a.slot_mapping, 37, int64_t{3});
  std::fill_n(a.cu_seqlens, 6, 4);
  std::fill_n(a.context_lens, 5, 5);
  std::fill_n(a.logit_rows, 3, 6);
  CHECK(std::count(a.token_ids, a.token_ids + 37, 1) == 37);
  CHECK(std::count(a.positions, a.positions + 37, 2) == 37);
  CHECK(std::count(a.slot_mapping, a.slot_mapping + 37, 3) == 37);
  CHECK(std::count(a.cu_seqlens, a.cu_seqlens + 6, 4) == 6);
  CHECK(std::count(a.context_lens, a.context_lens + 5, 5) == 5);
  CHECK(reinterpret_cast<std::byte*>(a.logit_rows + 3) <= memory.data() + bytes);
}

TEST_CASE("block tables stage what changed") {
  FakeOps ops(Device::kCuda);
  constexpr int kRows = 4, kBlocks = 100000;  // rows of 400 kB: copies of their own
  auto tables = StagedBlockTables::Create(ops, kRows, kBlocks).value();
  std::vector<BlockTable> rows(kRows);
  std::mt19937 random(11);
  uint64_t version = 0;
  for (BlockTable& row : rows) row.version = ++version;
  for (int step = 0; step < 200; ++step) {
    CAPTURE(step);
    size_t num_new = 0;
    for (int i = 0; i < kRows; ++i) {
      if (random() % 10 == 0) {  // another sequence
        rows[i].blocks.assign(random() % 5, static_cast<int32_t>(random() % 1000));
        rows[i].version = ++version;
        num_new += rows[i].blocks.size();
      }
      if (random() % 3 == 0) {
        rows[i].blocks.push_back(static_cast<int32_t>(random() % 1000));
        ++num_new;
      }
    }
    if (step == 0) num_new = 0;
    const size_t staged_before = ops.num_bytes_staged;
    for (int i = 0; i < kRows; ++i) tables.Fill(i, rows[i]);
    tables.Stage(ops);
    if (step > 0) CHECK(ops.num_bytes_staged - staged_before <= num_new * sizeof(int32_t));
    for (int i = 0; i < kRows; ++i) {
      const int32_t* row = tables.device() + int64_t{i} * kBlocks;
      REQUIRE(std::equal(rows[i].blocks.begin(), rows[i].blocks.end(), row));
    }
  }
  // Short rows go together.
  auto small = StagedBlockTables::Create(ops, kRows, 16).value();
  for (BlockTable& row : rows) row.blocks.resize(3, 7);
  for (int i = 0; i < kRows; ++i) small.Fill(i, rows[i]);
  const int copies_before = ops.num_copies_staged;
  small.Stage(ops);
  CHECK(ops.num_copies_staged == copies_before + 1);
}

TEST_CASE("logits of the warm-up are downloaded, and decoding is recorded before a request comes") {
  TestEngine engine(SmallOptions(), {}, Device::kCuda);
  CHECK(engine.ops.num_bytes_downloaded == 3 * FakeModel::kVocabSize * sizeof(float));
  CHECK(engine.ops.num_repeats == 2);  // for greedy requests and for others
  CHECK(engine.ops.reserved.max_tokens == SmallOptions().max_num_batched_tokens);
  CHECK(engine.ops.reserved.max_seqs == SmallOptions().max_num_seqs);
  CHECK(engine.ops.reserved.max_context == FakeModel().config().max_position);
  CHECK(engine->memory_plan() != nullptr);
  CHECK(TestEngine()->memory_plan() == nullptr);
}

TEST_CASE("tokens go out while the next step runs; what a stop string cuts off is thrown away") {
  Gate gate;
  TestEngine engine(
      SmallOptions(),
      [&](FakeModel& model) {
        Says(Tokens("say the end now"), 1)(model);
        model.on_forward = [&gate](const auto&) { gate.Pass(); };
      },
      Device::kCuda);
  Request request = GreedyRequest(Tokens("a"), 30);
  request.sampling.stop = {"end"};
  const int before = gate.num_arrivals();
  const auto sink = engine.Run(request);
  CHECK(sink->output().text == "say the ");
  CHECK(sink->output().tokens == Tokens("say the end"));
  CHECK(sink->Wait().completion_tokens == 11);
  CHECK(engine->stats().num_blocks_in_use == 0);
  CHECK(gate.num_arrivals() - before == 12);  // the last one's token is nobody's

  // The end of sequence is found one step late too; the length is known before.
  request.sampling.stop.clear();
  const int before_end = gate.num_arrivals();
  CHECK(engine.Run(request)->output().text == "say the end now");
  while (gate.num_arrivals() < before_end + 17) std::this_thread::yield();
  request.sampling.max_tokens = 7;
  CHECK(engine.Run(request)->output().tokens.size() == 7);
  CHECK(gate.num_arrivals() - before_end == 17 + 7);  // 15 letters, the end, and one for nobody

  // A token is with its reader before the step that follows it has ended.
  request.sampling.max_tokens = 30;
  const auto slow = std::make_shared<CollectingSink>();
  gate.Close();
  REQUIRE(engine->Submit(request, slow).ok());
  gate.WaitUntilHeld();  // the prompt's step
  gate.LetOnePass();
  gate.WaitUntilHeld();  // the second token's; the fake model runs where Forward is called
  gate.LetOnePass();
  slow->WaitForDeltas(1);
  gate.Open();
  slow->Wait();
}

TEST_CASE("a step that hangs is a failure, and draining does not wait for it") {
  Gate gate;
  EngineOptions options = SmallOptions();
  options.step_timeout = 0.05;
  TestEngine engine(
      options,
      [&gate](FakeModel& model) { model.on_forward = [&gate](const auto&) { gate.Pass(); }; },
      Device::kCuda);
  gate.Close();
  const auto sink = std::make_shared<CollectingSink>();
  REQUIRE(engine->Submit(GreedyRequest(Tokens("abc"), 4), sink).ok());
  gate.WaitUntilHeld();
  while (!engine->failed()) std::this_thread::yield();
  engine->Drain(std::chrono::steady_clock::now());
  CHECK_FALSE(sink->ended());
  gate.Open();  // so that this test's threads end
  sink->Wait();
}

TEST_CASE("policies are refused on a GPU, with the field's name") {
  TestEngine engine(SmallOptions(), {}, Device::kCuda);
  auto policy = std::make_shared<SparsityPolicy>();
  policy->selector.selector = FindSelector("none");
  Request request = GreedyRequest(Tokens("abc"), 4);
  request.sparsity = policy;
  const auto handle = engine->Submit(request, std::make_shared<CollectingSink>());
  REQUIRE_FALSE(handle.ok());
  CHECK(handle.status().code() == StatusCode::kInvalidArgument);
  CHECK_THAT(MessageOf(handle.status()), Catch::Matchers::Contains("served on the CPU only"));
}

}  // namespace
}  // namespace gloam
