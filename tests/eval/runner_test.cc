#include "eval/runner.h"

#include <atomic>
#include <fstream>
#include <mutex>

#include "catch2/catch.hpp"
#include "tests/eval/word_tokenizer.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

// Items "0" to "4"; the answer "good" scores 1.
class FiveItems final : public Task {
 public:
  std::string_view name() const override { return "five"; }
  json parameters() const override { return {{"items", 5}}; }
  std::vector<std::string> metrics() const override { return {"good"}; }
  int num_items() const override { return 5; }
  std::string ItemId(int index) const override { return fmt::format("{}", index); }
  StatusOr<EvalItem> MakeItem(int index) override {
    ++num_made;
    EvalItem item;
    item.id = ItemId(index);
    item.group = "all";
    item.prompt = {.tokens = std::vector<int32_t>(100, index), .num_decoded = 10};
    item.max_tokens = 7;
    item.references = {"good"};
    return item;
  }
  std::vector<double> Score(const EvalItem&, std::string_view answer) const override {
    return {answer == "good" ? 1.0 : 0.0};
  }
  int num_made = 0;
};

// Dense answers well; the others keep 30 tokens of the context. Fails from call `fail_at` on.
class FakeGenerator final : public TextGenerator {
 public:
  PromptTokenizer& tokenizer() override { return tokenizer_; }
  std::string model_name() const override { return "fake"; }
  int max_model_len() const override { return 1000; }
  json settings() const override { return {{"kv", "none"}}; }
  StatusOr<GeneratedText> Generate(const GenerateRequest& request) override {
    const int call = num_calls++;
    if (call >= fail_at) return Unavailable("gone");
    {
      std::lock_guard lock(mutex_);
      requests.push_back(request);
    }
    GeneratedText text{.text = request.policy.is_null() ? "good" : "bad", .num_tokens = 3};
    if (!request.policy.is_null()) {
      text.sparsity = SparsityUsage{.kept_tokens_per_head = 30,
                                    .loaded_tokens_per_kv_head = 40,
                                    .loaded_share = 0.4,
                                    .sparse_steps = 13};
    }
    return text;
  }
  std::atomic<int> num_calls{0};
  int fail_at = 1 << 30;
  std::vector<GenerateRequest> requests;

 private:
  WordTokenizer tokenizer_;
  std::mutex mutex_;
};

const json kTwilight = {{"selector", {{"type", "none"}}},
                        {"weight_pruner", {{"type", "top_p"}, {"threshold", 0.9}}}};
const std::vector<EvalPolicy> kPolicies = {
    {.name = "dense"},
    {.name = "twi", .body = kTwilight},
    {.name = "quest", .body = {{"selector", {{"type", "quest"}, {"token_budget", 64}}}}}};

TEST_CASE("Every item runs under every policy and under the matched-budget control") {
  const test::TempFolder folder;
  FiveItems task;
  FakeGenerator generator;
  std::vector<std::string> lines;
  const RunOptions options{.folder = folder.path() / "result_five" / "fake",
                           .concurrency = 3,
                           .progress = [&](const std::string& line) { lines.push_back(line); }};
  const auto table = RunTask(task, generator, kPolicies, options);
  INFO(table.status());
  REQUIRE(table.ok());
  CHECK(generator.num_calls == 5 * 4);
  CHECK(lines.size() == 10);
  CHECK(lines.front().find("[1/5] five 0:  dense 1.00") == 0);
  CHECK(table->find("| dense | 100.00 |") != table->npos);
  CHECK(table->find("| twi | 0.00 |") != table->npos);
  CHECK(table->find("| quest@30 (control) | 0.00 |") != table->npos);
  CHECK(generator.requests.front().policy.is_null());
  for (const GenerateRequest& request : generator.requests) {
    CHECK(request.num_decoded_prompt_tokens == 10);
    CHECK(request.max_tokens == 7);
  }
  for (const char* file :
       {"dense.jsonl", "twi.jsonl", "quest.jsonl", "quest@30.jsonl", "table.md", "plot.svg"}) {
    CHECK(std::filesystem::exists(options.folder / file));
  }
  // A server that does not tell the context still gives a share of it.
  CHECK(table->find("| 30.0 | 40.0 | 41.") != table->npos);

  // Again: nothing is left to do, and the table is the same.
  CHECK(*RunTask(task, generator, kPolicies, options) == *table);
  CHECK(generator.num_calls == 5 * 4);

  // One policy more: only its items run.
  std::vector<EvalPolicy> more = kPolicies;
  more.push_back({.name = "late", .body = {{"selector", {{"type", "streaming"}}}}});
  REQUIRE(RunTask(task, generator, more, options).ok());
  CHECK(generator.num_calls == 5 * 5);
}

TEST_CASE("A run that failed goes on where it was") {
  const test::TempFolder folder;
  FiveItems task;
  FakeGenerator generator;
  generator.fail_at = 7;
  const RunOptions options{.folder = folder.path(), .concurrency = 1};
  const auto failed = RunTask(task, generator, kPolicies, options);
  CHECK(MessageOf(failed.status()).find("2 under twi: gone") == 0);
  const int num_failed = generator.num_calls - 7;
  generator.fail_at = 1 << 30;
  REQUIRE(RunTask(task, generator, kPolicies, options).ok());
  CHECK(generator.num_calls == 5 * 4 + num_failed);
}

}  // namespace
}  // namespace gloam
