#include "server/output_queue.h"

#include <atomic>
#include <condition_variable>
#include <random>
#include <string>
#include <thread>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

OutputDelta Delta(int index, std::string text) {
  OutputDelta delta;
  delta.index = index;
  delta.text = std::move(text);
  delta.tokens = {static_cast<int32_t>(delta.text.size())};
  return delta;
}

OutputDelta Last(int index, FinishReason reason) {
  OutputDelta delta;
  delta.index = index;
  delta.finish_reason = reason;
  return delta;
}

TEST_CASE("Waiting deltas of one answer are merged in order") {
  int ready = 0;
  OutputQueue queue(1000, [&] { ++ready; });
  CHECK(queue.OnDelta(Delta(0, "a")));
  CHECK(queue.OnDelta(Delta(1, "x")));
  CHECK(queue.OnDelta(Delta(0, "bc")));
  CHECK(queue.OnDelta(Last(0, FinishReason::kStop)));
  CHECK(ready == 1);  // once for all that waits
  const auto batch = queue.Take();
  REQUIRE(batch.deltas.size() == 2);
  CHECK(batch.deltas[0].text == "abc");
  CHECK(batch.deltas[0].tokens == std::vector<int32_t>{1, 2});
  CHECK(batch.deltas[0].finish_reason == FinishReason::kStop);
  CHECK(batch.deltas[1].text == "x");
  CHECK_FALSE(batch.deltas[1].finish_reason);
  CHECK_FALSE(batch.summary);

  queue.OnEnd({.prompt_tokens = 3});
  CHECK(ready == 2);
  CHECK(queue.Take().summary->prompt_tokens == 3);
}

TEST_CASE("Past the bound deltas are refused, and the end says that text was lost") {
  OutputQueue queue(100, [] {});
  CHECK(queue.OnDelta(Delta(0, std::string(90, 'a'))));
  CHECK_FALSE(queue.OnDelta(Delta(0, std::string(20, 'b'))));
  OutputDelta last = Last(0, FinishReason::kStop);
  last.text = std::string(20, 'c');
  CHECK_FALSE(queue.OnDelta(std::move(last)));
  queue.OnEnd({});
  const auto batch = queue.Take();
  REQUIRE(batch.deltas.size() == 1);
  CHECK(batch.deltas[0].text == std::string(90, 'a'));
  CHECK(batch.deltas[0].finish_reason == FinishReason::kCancelled);
  CHECK(batch.summary);
}

TEST_CASE("Taking makes room again") {
  OutputQueue queue(100, [] {});
  for (int i = 0; i < 10; ++i) {
    CHECK(queue.OnDelta(Delta(0, std::string(90, 'a'))));
    CHECK(queue.Take().deltas[0].text.size() == 90);
  }
}

TEST_CASE("A closed queue takes nothing and calls nobody") {
  int ready = 0;
  OutputQueue queue(100, [&] { ++ready; });
  queue.Close();
  CHECK_FALSE(queue.OnDelta(Delta(0, "a")));
  queue.OnPromptLogprobs({SampleResult()});
  queue.OnEnd({});
  CHECK(ready == 0);
  CHECK(queue.Take().deltas.empty());
}

TEST_CASE("Nothing is lost between a writer and a reader on two threads") {
  constexpr unsigned kSeed = 7;
  INFO("seed " << kSeed);
  constexpr int kDeltas = 20000;
  std::mutex mutex;
  std::condition_variable changed;
  bool ready = false;
  OutputQueue queue(size_t{1} << 30, [&] {
    std::lock_guard lock(mutex);
    ready = true;
    changed.notify_one();
  });
  std::string sent[3];
  std::thread writer([&] {
    std::mt19937 random(kSeed);
    for (int i = 0; i < kDeltas; ++i) {
      const int index = static_cast<int>(random() % 3);
      const std::string text(random() % 4, static_cast<char>('a' + random() % 26));
      sent[index] += text;
      if (!queue.OnDelta(Delta(index, text))) return;
    }
    queue.OnEnd({});
  });
  std::string received[3];
  for (bool done = false; !done;) {
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return ready; });
      ready = false;
    }
    const auto batch = queue.Take();
    for (const OutputDelta& delta : batch.deltas) received[delta.index] += delta.text;
    done = batch.summary.has_value();
  }
  writer.join();
  for (int i = 0; i < 3; ++i) CHECK(received[i] == sent[i]);
}

}  // namespace
}  // namespace gloam
