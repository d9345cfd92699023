// Result files and what is made of them: reading back, resuming, tables, controls, pictures.
#include <cmath>
#include <fstream>
#include <sstream>

#include "catch2/catch.hpp"
#include "eval/plot.h"
#include "eval/report.h"
#include "eval/result_file.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

const EvalPolicy kDense{.name = "dense"};
const EvalPolicy kTwi{.name = "twi",
                      .body = {{"selector", {{"type", "quest"}, {"token_budget", 512}}},
                               {"weight_pruner", {{"type", "top_p"}, {"threshold", 0.9}}}}};

ResultRecord Record(const std::string& id, const std::string& group, double score) {
  ResultRecord record;
  record.id = id;
  record.group = group;
  record.scores = {score};
  record.prompt_tokens = 1000;
  record.decoded_prompt_tokens = 10;
  record.answer_tokens = 10;
  record.context_tokens = 1000;
  record.facts = {{"length", 1024}, {"depth", 0.5}};
  record.answer = "an answer";
  record.references = {"a reference"};
  return record;
}

ResultRecord SparseRecord(const std::string& id, double kept, double loaded, int64_t steps) {
  ResultRecord record = Record(id, "g", 1);
  record.sparsity = SparsityUsage{.kept_tokens_per_head = kept,
                                  .loaded_tokens_per_kv_head = loaded,
                                  .loaded_share = loaded / 1000,
                                  .context_tokens = 1000,
                                  .sparse_steps = steps,
                                  .bypassed_steps = 20 - steps};
  return record;
}

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// Tags open and close in order, attributes are quoted, text has no bare '<' or '&'.
bool IsWellFormed(const std::string& xml) {
  std::vector<std::string> open;
  for (size_t i = 0; i < xml.size();) {
    if (xml[i] == '&') {
      const size_t end = xml.find(';', i);
      const std::string entity = xml.substr(i, end - i + 1);
      if (entity != "&amp;" && entity != "&lt;" && entity != "&gt;" && entity != "&quot;")
        return false;
      i = end + 1;
      continue;
    }
    if (xml[i] != '<') {
      ++i;
      continue;
    }
    const size_t end = xml.find('>', i);
    if (end == xml.npos) return false;
    const std::string tag = xml.substr(i + 1, end - i - 1);
    if (tag.find('<') != tag.npos || std::count(tag.begin(), tag.end(), '"') % 2 != 0) return false;
    if (tag.front() == '/') {
      if (open.empty() || open.back() != tag.substr(1)) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
    i = end + 1;
  }
  return open.empty();
}

TEST_CASE("Results are read back as they were written, under equal parameters only") {
  const test::TempFolder folder;
  const auto path = folder.path() / "twi.jsonl";
  const json parameters = {{"seed", 1}};
  {
    auto file = ResultFile::Open(path, parameters, kTwi);
    REQUIRE(file.ok());
    ResultRecord record = SparseRecord("a", 50.5, 80, 15);
    record.sparsity->true_mass = 0.97;
    record.layers = {.num_layers = 3,
                     .num_kv_heads = 2,
                     .kept = {NAN, NAN, 0.25, 0.5, 0.125, 1},
                     .loaded = {1, 1, 0.5, 0.5, 0.25, 1}};
    record.answer = "not \xff UTF-8";
    REQUIRE(file->Append(record).ok());
    CHECK(file->Has("a"));
    CHECK_FALSE(file->Has("b"));
  }
  auto file = ResultFile::Open(path, parameters, kTwi);
  REQUIRE(file->records().size() == 1);
  const ResultRecord& read = file->records().front();
  CHECK(read.id == "a");
  CHECK(read.scores == std::vector<double>{1});
  CHECK(read.sparsity->kept_tokens_per_head == 50.5);
  CHECK(read.sparsity->sparse_steps == 15);
  CHECK(read.sparsity->true_mass == 0.97);
  CHECK(read.layers.num_layers == 3);
  CHECK(std::isnan(read.layers.kept[0]));
  CHECK(read.layers.kept[2] == 0.25);
  CHECK(read.layers.loaded[4] == 0.25);
  CHECK(read.facts["depth"] == 0.5);

  CHECK(ResultFile::Open(path, {{"seed", 2}}, kTwi)->records().empty());
  EvalPolicy other = kTwi;
  other.body["weight_pruner"]["threshold"] = 0.8;
  CHECK(ResultFile::Open(path, parameters, other)->records().empty());
  CHECK(ResultFile::Open(path, parameters, kTwi)->records().size() == 1);

  std::istringstream lines(ReadAll(path));
  for (std::string line; std::getline(lines, line);) CHECK(json::accept(line));
}

TEST_CASE("A line that a crash cut off is run again and harms no other") {
  const test::TempFolder folder;
  const auto path = folder.path() / "dense.jsonl";
  const json parameters = {{"seed", 1}};
  {
    auto file = ResultFile::Open(path, parameters, kDense);
    REQUIRE(file->Append(Record("a", "g", 1)).ok());
    REQUIRE(file->Append(Record("b", "g", 1)).ok());
  }
  const std::string whole = ReadAll(path);
  test::WriteFile(path, whole.substr(0, whole.size() - 40));
  {
    auto file = ResultFile::Open(path, parameters, kDense);
    CHECK(file->Has("a"));
    CHECK_FALSE(file->Has("b"));
    REQUIRE(file->Append(Record("b", "g", 0)).ok());
  }
  auto file = ResultFile::Open(path, parameters, kDense);
  REQUIRE(file->records().size() == 2);
  CHECK(file->records()[1].scores.front() == 0);
  CHECK(ResultFile::Open(folder.path() / "no" / "such", parameters, kDense).status().code() ==
        StatusCode::kUnavailable);
}

TEST_CASE("Summaries weight tokens by steps and groups equally") {
  PolicyResults dense{.policy = kDense};
  dense.records = {Record("a", "x", 1), Record("b", "x", 0), Record("c", "y", 1)};
  const PolicySummary plain = Summarize(dense);
  CHECK(plain.metrics.front() == Approx(0.75));  // (0.5 + 1) / 2
  CHECK(plain.groups.at("x") == Approx(0.5));
  CHECK(plain.standard_error == Approx(std::sqrt(2.0 / 3 / 2 / 3)));
  CHECK(plain.context_tokens == 1000);
  CHECK(plain.loaded_per_kv_head == 1000);
  CHECK(plain.num_sparse_steps == 0);

  PolicyResults sparse{.policy = kTwi};
  sparse.records = {SparseRecord("a", 100, 200, 20), SparseRecord("b", 40, 50, 5)};
  const PolicySummary summary = Summarize(sparse);
  CHECK(summary.kept_per_head == Approx((100 * 20 + 40 * 5) / 25.0));
  CHECK(summary.loaded_per_kv_head == Approx((200 * 20 + 50 * 5) / 25.0));
  CHECK(summary.num_steps == 38);  // the last token of an answer is not fed
  CHECK(summary.num_sparse_steps == 25);
  CHECK_FALSE(summary.true_mass.has_value());
}

TEST_CASE("Controls take the budget that was measured, each once") {
  PolicyResults twi{.policy = kTwi};
  twi.records = {SparseRecord("a", 100.4, 200, 20)};
  PolicyResults same = twi;
  same.policy.name = "same";
  PolicyResults bypassed{.policy = kTwi};
  bypassed.records = {SparseRecord("a", 0, 0, 0)};
  PolicyResults fixed{.policy = {.name = "quest", .body = {{"selector", {{"type", "quest"}}}}}};
  fixed.records = twi.records;
  const auto controls = ControlsFor({{.policy = kDense}, twi, same, bypassed, fixed});
  REQUIRE(controls.size() == 1);
  CHECK(controls.front().name == "quest@100");
  CHECK(controls.front().body["selector"]["token_budget"] == 100);
}

TEST_CASE("A report holds every policy of the folder, the dense one first") {
  const test::TempFolder folder;
  const json parameters = {{"seed", 1}};
  const auto write = [&](const EvalPolicy& policy, std::vector<ResultRecord> records) {
    auto file = ResultFile::Open(folder.path() / (policy.name + ".jsonl"), parameters, policy);
    REQUIRE(file.ok());
    for (ResultRecord& record : records) REQUIRE(file->Append(std::move(record)).ok());
  };
  ResultRecord sparse = SparseRecord("a", 100, 200, 20);
  sparse.layers = {.num_layers = 1, .num_kv_heads = 2, .kept = {0.1, 0.3}, .loaded = {0.2, 0.4}};
  write({.name = "an<odd>&name", .body = kTwi.body}, {sparse});
  write(kDense, {Record("a", "1024", 1), Record("b", "2048", 0.5)});
  EvalPolicy control = MatchedControl(kTwi, 100);
  write(control, {SparseRecord("a", 100, 220, 20)});
  ReportSpec spec{.title = "passkey: tiny",
                  .metrics = {{.title = "exact"}},
                  .group_title = "length",
                  .parameters = parameters};
  const auto table = WriteReport(folder.path(), spec, /*passkey_maps=*/true);
  INFO(table.status());
  REQUIRE(table.ok());
  CHECK(*table == ReadAll(folder.path() / "table.md"));
  const size_t dense =
      table->find("| dense | 75.00 | 25.00 | 1000.0 | 1000.0 | 100.00 % | 0.0 % |");
  const size_t pruned = table->find("| an<odd>&name | 100.00 | 0.00 | 100.0 | 200.0 | 20.00 % |");
  const size_t fixed = table->find("| quest@100 (control) | 100.00 | 0.00 | 100.0 | 220.0 |");
  CHECK(dense != table->npos);
  CHECK(pruned != table->npos);
  CHECK(fixed != table->npos);
  CHECK(dense < pruned);
  CHECK(table->find("| 2048 | 50.00 |") != table->npos);

  const json layers = json::parse(ReadAll(folder.path() / "layers.json"));
  CHECK(layers["an<odd>&name"]["loaded_share"] == json::parse("[[0.2, 0.4]]"));
  const std::string plot = ReadAll(folder.path() / "plot.svg");
  CHECK(IsWellFormed(plot));
  CHECK(plot.find("an&lt;odd&gt;&amp;name") != plot.npos);
  CHECK(IsWellFormed(ReadAll(folder.path() / "heatmap_dense.svg")));
}

TEST_CASE("Pictures are well formed whatever the values") {
  ScatterPlot plot{.title = "t & u", .x_label = "x", .y_label = "y", .log_y = true};
  CHECK(IsWellFormed(RenderScatter(plot)));
  plot.points = {{"dense", 8000, 0, PlotPoint::Kind::kDense},
                 {"a", 100, 0.01, PlotPoint::Kind::kPolicy},
                 {"b", 100, 0.01, PlotPoint::Kind::kControl},
                 {"nan", NAN, NAN, PlotPoint::Kind::kPolicy}};
  const std::string svg = RenderScatter(plot);
  CHECK(IsWellFormed(svg));
  // Labels at one place are moved apart.
  const auto y_of = [&](const std::string& label) {
    const size_t end = svg.find(">" + label + "</text>");
    const size_t at = svg.rfind("y=\"", end);
    return std::stod(svg.substr(at + 3));
  };
  CHECK(std::abs(y_of("a") - y_of("b")) >= 12);

  HeatMap map{.title = "m", .columns = {"1", "2"}, .rows = {"0 %"}, .values = {0.5, std::nullopt}};
  const std::string heat = RenderHeatMap(map);
  CHECK(IsWellFormed(heat));
  CHECK(heat.find(">50</text>") != heat.npos);
}

}  // namespace
}  // namespace gloam
