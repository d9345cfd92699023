#include "eval/teacher_forcing.h"

#include <cmath>
#include <fstream>
#include <numeric>

#include "catch2/catch.hpp"
#include "eval/forced_benchmark.h"
#include "eval/forced_model.h"
#include "eval/paged_forced_decoder.h"
#include "models/attention/policy_json.h"
#include "tests/models/paged_runner.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

using Policies = std::vector<std::shared_ptr<const SparsityPolicy>>;

// Rows with given logits at every step; row 1 has a policy.
class FixedDecoder final : public ForcedDecoder {
 public:
  explicit FixedDecoder(std::vector<std::vector<float>> logits) : logits_(std::move(logits)) {}
  Status Start(std::span<const int32_t>, std::span<const int32_t> tokens, RowPolicies) override {
    to_feed.assign(tokens.begin(), tokens.end());
    return OkStatus();
  }
  Step Next() override {
    Step step;
    step.logits.assign(logits_.begin(), logits_.end());
    if (++num_steps > 1) {  // the first step is bypassed
      step.sparsity = {.rows = rows_, .stats = stats_.data(), .num_layers = 4, .num_kv_heads = 1};
    }
    return step;
  }
  std::vector<int32_t> to_feed;
  int num_steps = 0;

 private:
  std::vector<std::vector<float>> logits_;
  std::vector<SparseRow> rows_ = {{.token = 0, .seq = 0}};
  std::vector<SparseHeadStats> stats_ = {{.context = 100, .kept = 100, .loaded = 100},
                                         {.context = 100, .kept = 100, .loaded = 100},
                                         {.context = 100, .kept = 10, .loaded = 20},
                                         {.context = 100, .kept = 30, .loaded = 60}};
};

TEST_CASE("Likelihood, divergence and agreement of known distributions") {
  const float ln2 = std::log(2.0f), ln4 = std::log(4.0f);
  // Dense: 1/2, 1/4, 1/4. The other: 1/4, 1/2, 1/4, with an offset that changes nothing.
  FixedDecoder decoder({{ln4, ln2, ln2}, {ln2 + 5, ln4 + 5, ln2 + 5}});
  const auto policy = std::make_shared<const SparsityPolicy>();
  const Policies policies = {nullptr, policy};
  const std::vector<int32_t> context(16, 0), tokens = {2, 0, 1, 1};
  const auto scores = RunTeacherForcing(decoder, context, tokens, policies);
  REQUIRE(scores.ok());
  CHECK(decoder.to_feed == std::vector<int32_t>{2, 0, 1});
  CHECK(decoder.num_steps == 3);
  const ForcedScores& dense = scores->at(0);
  CHECK(dense.num_tokens == 3);
  CHECK(dense.nll == Approx((std::log(2) + 2 * std::log(4)) / 3));  // of tokens 0, 1, 1
  CHECK(dense.kl == 0);
  CHECK(dense.agreement == 1);
  CHECK_FALSE(dense.sparsity.has_value());
  const ForcedScores& other = scores->at(1);
  CHECK(other.nll == Approx((std::log(4) + 2 * std::log(2)) / 3));
  // 1/2 ln 2 - 1/4 ln 2
  CHECK(other.kl == Approx(std::log(2) / 4).epsilon(1e-5));
  CHECK(other.max_kl == Approx(std::log(2) / 4).epsilon(1e-5));
  CHECK(other.agreement == 0);
  REQUIRE(other.sparsity.has_value());
  CHECK(other.sparsity->sparse_steps == 2);
  CHECK(other.sparsity->bypassed_steps == 1);
  CHECK(other.sparsity->kept_tokens_per_head == Approx(20));
  CHECK(other.sparsity->loaded_tokens_per_kv_head == Approx(40));
  REQUIRE(other.layers.num_layers == 4);
  CHECK(other.layers.kept[0] == 1);
  CHECK(other.layers.kept[2] == Approx(0.1));
  CHECK(other.layers.loaded[3] == Approx(0.6));
  CHECK_FALSE(RunTeacherForcing(decoder, context, std::vector<int32_t>{1}, policies).ok());
}

TEST_CASE("Windows do not reach past the text") {
  ForcedOptions options{.context = 32, .decoded = 8};
  CHECK(WindowStarts(40, 0, options).empty());
  CHECK(WindowStarts(41, 0, options) == std::vector<int64_t>{0});
  CHECK(WindowStarts(40, 1, options) == std::vector<int64_t>{0});
  CHECK(WindowStarts(81, 0, options) == std::vector<int64_t>{0, 40});
  options.stride = 10;
  CHECK(WindowStarts(61, 0, options) == std::vector<int64_t>{0, 10, 20});
  options.windows = 2;
  CHECK(WindowStarts(1000, 0, options) == std::vector<int64_t>{0, 10});
}

// A tiny model with two layers that may be sparse, and a text for it.
struct TinySetUp {
  TinySetUp() {
    test::WriteTinyGguf(folder.path() / "tiny.gguf", {.num_layers = 4, .max_position = 1024});
    std::string text;
    for (int i = 0; i < 400; ++i) text += fmt::format("line {} of {}\n", i * 7919 % 1000, i);
    test::WriteFile(folder.path() / "text.txt", text);
    auto loaded =
        ForcedModel::Load(folder.path() / "tiny.gguf", {.name = "tiny", .cpu = {.num_threads = 2}});
    INFO(loaded.status());
    REQUIRE(loaded.ok());
    model = *std::move(loaded);
  }
  test::TempFolder folder;
  std::unique_ptr<ForcedModel> model;
};

const json kKeepsAll = {{"selector", {{"type", "none"}}}};
const json kStreaming = {
    {"selector", {{"type", "streaming"}, {"num_sinks", 4}, {"token_budget", 32}}}};
const json kTopP = {{"selector", {{"type", "none"}}},
                    {"weight_pruner", {{"type", "top_p"}, {"threshold", 0.5}}}};
const json kSnapKv = {{"compressor",
                       {{"type", "snap_kv"},
                        {"window_size", 16},
                        {"max_capacity_prompt", 48},
                        {"kernel_size", 5},
                        {"pooling", "avgpool"}}},
                      {"selector", {{"type", "none"}}}};

TEST_CASE("A dense row gives the likelihoods of one whole prefill; keeping all changes no bit") {
  TinySetUp tiny;
  std::vector<int32_t> tokens(256 + 40);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 31 % 250);
  Policies policies;
  for (const json& body : {json(nullptr), kKeepsAll, kStreaming, kSnapKv}) {
    auto policy = tiny.model->Parse(body);
    INFO(policy.status());
    REQUIRE(policy.ok());
    policies.push_back(*policy);
  }
  auto decoder = tiny.model->MakeDecoder(256, 48, policies);
  INFO(decoder.status());
  REQUIRE(decoder.ok());
  const std::span<const int32_t> all(tokens);
  for (int round = 0; round < 2; ++round) {  // a decoder can be used again
    const auto scores = RunTeacherForcing(**decoder, all.first(256), all.subspan(256), policies);
    REQUIRE(scores.ok());

    auto ops = MakeCpuOps({.num_threads = 2});
    auto loaded = LoadModel(tiny.folder.path() / "tiny.gguf", *ops, {});
    REQUIRE(loaded->model->Reserve(512, 512).ok());
    PagedRunner whole(*loaded->model, *ops, DefaultKvDType(loaded->model->config()), 32, 1);
    PagedRunner::Chunk chunk{.sequence = whole.AddSequence(), .tokens = tokens};
    for (int i = 256; i < 295; ++i) chunk.logit_rows.push_back(i);
    const TensorView logits = whole.Step(chunk);
    double nll = 0;
    const int64_t vocab = logits.shape[1];
    for (int i = 0; i < 39; ++i) {
      const auto* row = logits.Rows(i, 1).Data<const float>();
      double sum = 0;
      for (int64_t j = 0; j < vocab; ++j) sum += std::exp(static_cast<double>(row[j]));
      nll += std::log(sum) - row[tokens[static_cast<size_t>(257 + i)]];
    }
    CHECK(scores->at(0).nll == Approx(nll / 39).epsilon(1e-6));
    CHECK(scores->at(1).kl == 0);
    CHECK(scores->at(1).nll == scores->at(0).nll);
    CHECK(scores->at(1).sparsity->kept_tokens_per_head ==
          Approx(scores->at(1).sparsity->context_tokens));
    CHECK(scores->at(2).kl > 0);
    CHECK(scores->at(2).sparsity->kept_tokens_per_head < 64);
    CHECK(scores->at(2).layers.kept.back() < 0.25);
    CHECK(scores->at(3).kl > 0);
    CHECK(scores->at(3).sparsity->kept_tokens_per_head < 48 + 48);
  }
}

TEST_CASE("A decoder refuses what it has no room for") {
  TinySetUp tiny;
  const Policies policies = {nullptr};
  CHECK(tiny.model->MakeDecoder(1024, 16, policies).status().code() ==
        StatusCode::kInvalidArgument);
  auto decoder = tiny.model->MakeDecoder(64, 16, policies);
  REQUIRE(decoder.ok());
  CHECK_FALSE((*decoder)->Start(std::vector<int32_t>(60, 1), {}, policies).ok());
  CHECK_FALSE((*decoder)->Start(std::vector<int32_t>(80, 1), {}, policies).ok());
  CHECK_FALSE((*decoder)->Start(std::vector<int32_t>(64, 1), {}, Policies{nullptr, nullptr}).ok());
}

TEST_CASE("gloam eval kl and ppl over a text: rows, control, layers, resume") {
  TinySetUp tiny;
  const std::vector<EvalPolicy> policies = {
      {.name = "dense"}, {.name = "stream", .body = kStreaming}, {.name = "topp", .body = kTopP}};
  ForcedOptions options{.benchmark = "kl",
                        .texts = {tiny.folder.path() / "text.txt"},
                        .context = 128,
                        .decoded = 16,
                        .windows = 3};
  int num_lines = 0;
  RunOptions run{.folder = tiny.folder.path() / "kl",
                 .progress = [&](const auto&) { ++num_lines; }};
  const auto table = RunForcedBenchmark(*tiny.model, options, policies, run);
  INFO(table.status());
  REQUIRE(table.ok());
  CHECK(num_lines == 6);  // three windows, twice: for the policies and for the control
  CHECK(table->find("| dense | 0.00000 |") != table->npos);
  CHECK(table->find("| stream | ") != table->npos);
  CHECK(table->find("(control)") != table->npos);
  std::ifstream layers(run.folder / "layers.json");
  const json shares = json::parse(layers);
  CHECK(shares["topp"]["kept_share"].size() == 4);
  CHECK(shares["topp"]["kept_share"][0] == json::parse("[1.0, 1.0]"));
  CHECK(shares["topp"]["kept_share"][2][0].get<double>() < 1);

  CHECK(*RunForcedBenchmark(*tiny.model, options, policies, run) == *table);
  CHECK(num_lines == 6);

  options.benchmark = "ppl";
  run.folder = tiny.folder.path() / "ppl";
  const auto ppl = RunForcedBenchmark(*tiny.model, options, policies, run);
  REQUIRE(ppl.ok());
  CHECK(ppl->find("| policy | perplexity |") != ppl->npos);

  options.texts.clear();
  CHECK(MessageOf(RunForcedBenchmark(*tiny.model, options, policies, run).status())
            .find("--text is missing") == 0);
  options.texts = {tiny.folder.path() / "none.txt"};
  CHECK(RunForcedBenchmark(*tiny.model, options, policies, run).status().code() ==
        StatusCode::kNotFound);
  options.texts = {tiny.folder.path() / "text.txt"};
  options.context = 100;
  CHECK(RunForcedBenchmark(*tiny.model, options, policies, run).status().code() ==
        StatusCode::kInvalidArgument);
}

TEST_CASE("Policies whose sidecars have different shapes run one after the other") {
  TinySetUp tiny;
  const auto quantised = [](int bits) {
    return json{{"selector", {{"type", "none"}}},
                {"weight_estimator", {{"type", "min_max_quant"}, {"quant_bit", bits}}},
                {"weight_pruner", {{"type", "top_p"}, {"threshold", 0.9}}}};
  };
  const std::vector<EvalPolicy> policies = {{.name = "dense"},
                                            {.name = "four", .body = quantised(4)},
                                            {.name = "two", .body = quantised(2)}};
  const ForcedOptions options{
      .texts = {tiny.folder.path() / "text.txt"}, .context = 128, .decoded = 8, .windows = 1};
  const auto table =
      RunForcedBenchmark(*tiny.model, options, policies, {.folder = tiny.folder.path() / "out"});
  INFO(table.status());
  REQUIRE(table.ok());
  CHECK(table->find("| four | ") != table->npos);
  CHECK(table->find("| two | ") != table->npos);
}

}  // namespace
}  // namespace gloam
