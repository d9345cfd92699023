// Reports: the table, the plot and the shares by layer that a benchmark leaves beside its result
// files. Pure but for WriteReport.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "eval/result_file.h"

namespace gloam {

struct ReportMetric {
  enum class Show {
    kPercent,      // a share
    kExponential,  // of nats: a perplexity
    kNats,
  };
  std::string title;
  Show show = Show::kPercent;
};

struct ReportSpec {
  std::string title;
  std::vector<ReportMetric> metrics;  // by ResultRecord::scores; the first is what the plot shows
  bool log_plot = false;
  std::string group_title;  // what ResultRecord::group is
  nlohmann::json parameters;
};

// One row of the table.
struct PolicySummary {
  EvalPolicy policy;
  int num_items = 0;
  std::vector<double> metrics;           // means over groups of the groups' means
  double standard_error = 0;             // of the first metric, over items
  std::map<std::string, double> groups;  // the first metric's mean
  int64_t num_steps = 0;                 // decode steps
  int64_t num_sparse_steps = 0;
  // Means over sparse steps; over all steps where none was sparse.
  double context_tokens = 0;
  double kept_per_head = 0;       // per query head: the paper's budget
  double loaded_per_kv_head = 0;  // whose keys and values were read
  std::optional<double> true_mass;
  LayerShares layers;
};

PolicySummary Summarize(const PolicyResults& results);

// Markdown: a row per policy, then a table by group.
std::string RenderTable(const ReportSpec& spec, const std::vector<PolicySummary>& rows);

// The first metric against the mean number of loaded tokens, as SVG.
std::string RenderReportPlot(const ReportSpec& spec, const std::vector<PolicySummary>& rows);

// Passkey's grid of one policy: facts "length" and "depth", as SVG.
std::string RenderPasskeyMap(const PolicyResults& results);

// The matched-budget controls of the policies that prune by mass, with the budgets they measured;
// none for a policy without a sparse step, and one where two would be the same.
std::vector<EvalPolicy> ControlsFor(const std::vector<PolicyResults>& results);

// Writes table.md, plot.svg, layers.json (where results have shares by layer), and for passkey
// heatmap_POLICY.svg, from everything in `folder` under the spec's parameters; returns the table.
// Errors: kUnavailable naming the path.
[[nodiscard]] StatusOr<std::string> WriteReport(const std::filesystem::path& folder,
                                                const ReportSpec& spec, bool passkey_maps);

}  // namespace gloam
