#include "eval/report.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "eval/plot.h"
#include "fmt/ranges.h"

namespace gloam {
namespace {

using nlohmann::json;

double MeanOf(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

double StandardError(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = MeanOf(values);
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  const auto count = static_cast<double>(values.size());
  return std::sqrt(squares / (count - 1) / count);
}

std::string Shown(ReportMetric::Show show, double value) {
  switch (show) {
    case ReportMetric::Show::kPercent:
      return fmt::format("{:.2f}", value * 100);
    case ReportMetric::Show::kExponential:
      return fmt::format("{:.4f}", std::exp(value));
    case ReportMetric::Show::kNats:
      return fmt::format("{:.5f}", value);
  }
  return "";
}

// The error of what Shown shows.
std::string ShownError(ReportMetric::Show show, double value, double error) {
  const double scale = show == ReportMetric::Show::kPercent       ? 100
                       : show == ReportMetric::Show::kExponential ? std::exp(value)
                                                                  : 1;
  return fmt::format("{:.{}f}", error * scale, show == ReportMetric::Show::kPercent ? 2 : 4);
}

double Plotted(ReportMetric::Show show, double value) {
  if (show == ReportMetric::Show::kPercent) return value * 100;
  return show == ReportMetric::Show::kExponential ? std::exp(value) : value;
}

// "12", "12.5": natural numbers as such, in the order of their size.
bool ByNumberThenText(const std::string& a, const std::string& b) {
  const auto number = [](const std::string& text) {
    const bool digits = !text.empty() && text.find_first_not_of("0123456789.") == text.npos;
    return digits ? std::atof(text.c_str()) : -1.0;
  };
  const double x = number(a), y = number(b);
  return x != y ? x < y : a < b;
}

void AddTokens(const std::vector<ResultRecord>& records, PolicySummary& summary) {
  double context = 0, sparse_context = 0, kept = 0, loaded = 0, mass = 0;
  int64_t mass_steps = 0;
  for (const ResultRecord& record : records) {
    summary.num_steps += record.num_steps();
    context += record.context_tokens * record.num_steps();
    if (!record.sparsity) continue;
    const auto steps = static_cast<double>(record.sparsity->sparse_steps);
    summary.num_sparse_steps += record.sparsity->sparse_steps;
    sparse_context += record.sparsity->context_tokens * steps;
    kept += record.sparsity->kept_tokens_per_head * steps;
    loaded += record.sparsity->loaded_tokens_per_kv_head * steps;
    if (record.sparsity->true_mass) {
      mass += *record.sparsity->true_mass * steps;
      mass_steps += record.sparsity->sparse_steps;
    }
  }
  if (summary.num_sparse_steps == 0) {
    summary.context_tokens =
        summary.num_steps == 0 ? 0 : context / static_cast<double>(summary.num_steps);
    summary.kept_per_head = summary.loaded_per_kv_head = summary.context_tokens;
    return;
  }
  const auto steps = static_cast<double>(summary.num_sparse_steps);
  summary.context_tokens = sparse_context / steps;
  summary.kept_per_head = kept / steps;
  summary.loaded_per_kv_head = loaded / steps;
  if (mass_steps > 0) summary.true_mass = mass / static_cast<double>(mass_steps);
}

// Means over the records, weighted by their sparse steps.
LayerShares MeanShares(const std::vector<ResultRecord>& records) {
  LayerShares means;
  double total = 0;
  for (const ResultRecord& record : records) {
    if (record.layers.empty() || !record.sparsity) continue;
    if (means.empty()) {
      means = record.layers;
      std::fill(means.kept.begin(), means.kept.end(), 0);
      std::fill(means.loaded.begin(), means.loaded.end(), 0);
    }
    if (record.layers.kept.size() != means.kept.size()) continue;
    const auto weight = static_cast<double>(record.sparsity->sparse_steps);
    total += weight;
    for (size_t i = 0; i < means.kept.size(); ++i) {
      means.kept[i] += record.layers.kept[i] * weight;
      means.loaded[i] += record.layers.loaded[i] * weight;
    }
  }
  for (auto* shares : {&means.kept, &means.loaded}) {
    for (double& share : *shares) share /= total;
  }
  return means;
}

json ShareRows(const LayerShares& layers, const std::vector<double>& shares) {
  json rows = json::array();
  for (int layer = 0; layer < layers.num_layers; ++layer) {
    const auto begin = shares.begin() + int64_t{layer} * layers.num_kv_heads;
    rows.push_back(std::vector<double>(begin, begin + layers.num_kv_heads));
  }
  return rows;
}

std::string GroupTable(const ReportSpec& spec, const std::vector<PolicySummary>& rows) {
  std::set<std::string, decltype(&ByNumberThenText)> groups(&ByNumberThenText);
  for (const PolicySummary& row : rows) {
    for (const auto& [group, _] : row.groups) groups.insert(group);
  }
  if (groups.size() < 2) return "";
  std::string table = fmt::format("\n{} by {}:\n\n| {} |", spec.metrics[0].title, spec.group_title,
                                  spec.group_title);
  for (const PolicySummary& row : rows) table += fmt::format(" {} |", row.policy.name);
  table += "\n|---|";
  for (size_t i = 0; i < rows.size(); ++i) table += "---:|";
  table += "\n";
  for (const std::string& group : groups) {
    table += fmt::format("| {} |", group);
    for (const PolicySummary& row : rows) {
      const auto value = row.groups.find(group);
      table += value == row.groups.end()
                   ? " |"
                   : fmt::format(" {} |", Shown(spec.metrics[0].show, value->second));
    }
    table += "\n";
  }
  return table;
}

Status WriteText(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text << std::flush;
  return file ? OkStatus() : Unavailable("cannot write {}", path.string());
}

}  // namespace

PolicySummary Summarize(const PolicyResults& results) {
  PolicySummary summary{.policy = results.policy};
  summary.num_items = static_cast<int>(results.records.size());
  if (results.records.empty()) return summary;
  const size_t num_metrics = results.records.front().scores.size();
  for (size_t metric = 0; metric < num_metrics; ++metric) {
    std::map<std::string, std::vector<double>> by_group;
    std::vector<double> all;
    for (const ResultRecord& record : results.records) {
      by_group[record.group].push_back(record.scores.at(metric));
      all.push_back(record.scores.at(metric));
    }
    std::vector<double> means;
    for (const auto& [group, values] : by_group) {
      means.push_back(MeanOf(values));
      if (metric == 0) summary.groups[group] = means.back();
    }
    summary.metrics.push_back(MeanOf(means));
    if (metric == 0) summary.standard_error = StandardError(all);
  }
  AddTokens(results.records, summary);
  summary.layers = MeanShares(results.records);
  return summary;
}

std::string RenderTable(const ReportSpec& spec, const std::vector<PolicySummary>& rows) {
  std::string table = fmt::format("# {}\n\n| policy |", spec.title);
  for (size_t i = 0; i < spec.metrics.size(); ++i) {
    table += fmt::format(" {} |", spec.metrics[i].title);
    if (i == 0) table += " std. error |";
  }
  table +=
      " kept per query head | loaded per KV head | of context | sparse steps | true mass | items "
      "|\n"
      "|---|";
  for (size_t i = 0; i < spec.metrics.size() + 7; ++i) table += "---:|";
  table += "\n";
  for (const PolicySummary& row : rows) {
    table += fmt::format("| {}{} |", row.policy.name, row.policy.is_control ? " (control)" : "");
    for (size_t i = 0; i < spec.metrics.size(); ++i) {
      const ReportMetric::Show show = spec.metrics[i].show;
      table += fmt::format(" {} |", Shown(show, row.metrics.at(i)));
      if (i == 0) {
        table += fmt::format(" {} |", ShownError(show, row.metrics.at(0), row.standard_error));
      }
    }
    const double share = row.context_tokens > 0 ? row.loaded_per_kv_head / row.context_tokens : 0;
    const double sparse = row.num_steps > 0 ? 100.0 * static_cast<double>(row.num_sparse_steps) /
                                                  static_cast<double>(row.num_steps)
                                            : 0;
    table += fmt::format(" {:.1f} | {:.1f} | {:.2f} % | {:.1f} % | {} | {} |\n", row.kept_per_head,
                         row.loaded_per_kv_head, share * 100, sparse,
                         row.true_mass ? fmt::format("{:.4f}", *row.true_mass) : "", row.num_items);
  }
  table += GroupTable(spec, rows);
  table += fmt::format(
      "\nThe context is prefilled densely; what follows it in the prompt and the answer are "
      "decoded "
      "under the policy. Kept: tokens attended to, mean over query heads, layers from the third on "
      "and sparse steps. Loaded: tokens whose keys and values are read for a KV head (the union "
      "over "
      "its query heads). \"(control)\": the same selector with the fixed budget that the policy "
      "was "
      "measured to keep.\n\nParameters: `{}`\n",
      spec.parameters.dump());
  return table;
}

std::string RenderReportPlot(const ReportSpec& spec, const std::vector<PolicySummary>& rows) {
  ScatterPlot plot{.title = spec.title,
                   .x_label = "mean tokens loaded per KV head and step",
                   .y_label = spec.metrics[0].title,
                   .log_y = spec.log_plot};
  for (const PolicySummary& row : rows) {
    plot.points.push_back({.label = row.policy.name,
                           .x = row.loaded_per_kv_head,
                           .y = Plotted(spec.metrics[0].show, row.metrics.at(0)),
                           .kind = row.policy.dense()      ? PlotPoint::Kind::kDense
                                   : row.policy.is_control ? PlotPoint::Kind::kControl
                                                           : PlotPoint::Kind::kPolicy});
  }
  return RenderScatter(plot);
}

std::string RenderPasskeyMap(const PolicyResults& results) {
  std::map<std::pair<double, int>, std::vector<double>> cells;  // by depth and length
  std::set<double> depths;
  std::set<int> lengths;
  for (const ResultRecord& record : results.records) {
    const double depth = record.facts.at("depth");
    const int length = record.facts.at("length");
    depths.insert(depth);
    lengths.insert(length);
    cells[{depth, length}].push_back(record.scores.at(0));
  }
  HeatMap map{.title = fmt::format("passkey: {}", results.policy.name),
              .x_label = "length (tokens)",
              .y_label = "depth"};
  for (const int length : lengths) map.columns.push_back(fmt::format("{}", length));
  for (const double depth : depths) {
    map.rows.push_back(fmt::format("{:.0f} %", depth * 100));
    for (const int length : lengths) {
      const auto cell = cells.find({depth, length});
      map.values.push_back(cell == cells.end() ? std::nullopt
                                               : std::optional<double>(MeanOf(cell->second)));
    }
  }
  return RenderHeatMap(map);
}

std::vector<EvalPolicy> ControlsFor(const std::vector<PolicyResults>& results) {
  std::vector<EvalPolicy> controls;
  for (const PolicyResults& result : results) {
    if (!result.policy.prunes_by_mass()) continue;
    const PolicySummary summary = Summarize(result);
    if (summary.num_sparse_steps == 0) continue;
    EvalPolicy control = MatchedControl(
        result.policy, std::max(1, static_cast<int>(std::lround(summary.kept_per_head))));
    bool known = false;
    for (const EvalPolicy& other : controls) {
      known |= other.body == control.body;
      if (other.name == control.name && !known) control.name += "+" + result.policy.name;
    }
    if (!known) controls.push_back(std::move(control));
  }
  return controls;
}

StatusOr<std::string> WriteReport(const std::filesystem::path& folder, const ReportSpec& spec,
                                  bool passkey_maps) {
  GLOAM_ASSIGN_OR_RETURN(const auto results, CollectResults(folder, spec.parameters));
  std::vector<PolicySummary> rows;
  json layers = json::object();
  for (const PolicyResults& result : results) {
    rows.push_back(Summarize(result));
    const LayerShares& shares = rows.back().layers;
    if (!shares.empty()) {
      layers[result.policy.name] = {{"kept_share", ShareRows(shares, shares.kept)},
                                    {"loaded_share", ShareRows(shares, shares.loaded)}};
    }
    if (passkey_maps) {
      GLOAM_RETURN_IF_ERROR(WriteText(folder / fmt::format("heatmap_{}.svg", result.policy.name),
                                      RenderPasskeyMap(result)));
    }
  }
  if (!layers.empty()) {
    GLOAM_RETURN_IF_ERROR(WriteText(folder / "layers.json", layers.dump() + "\n"));
  }
  GLOAM_RETURN_IF_ERROR(WriteText(folder / "plot.svg", RenderReportPlot(spec, rows)));
  std::string table = RenderTable(spec, rows);
  GLOAM_RETURN_IF_ERROR(WriteText(folder / "table.md", table));
  return table;
}

}  // namespace gloam
