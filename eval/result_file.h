// ResultFile: the finished items of one policy, a line of JSON each, appended as they come, so that
// a run that was stopped goes on where it was. Lines of runs with other parameters stay in the file
// and are not looked at. One thread at a time.
#pragma once

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/request.h"
#include "eval/policy_set.h"
#include "nlohmann/json.hpp"

namespace gloam {

// Means over the decode steps of one item by layer and KV head, as shares of the context. Empty
// where the run does not see them (over HTTP, through the engine); NaN for layers not recorded.
struct LayerShares {
  int num_layers = 0;
  int num_kv_heads = 0;
  std::vector<double> kept;    // [num_layers][num_kv_heads], mean of the query heads; dense: 1
  std::vector<double> loaded;  // [num_layers][num_kv_heads]; dense: 1

  bool empty() const { return kept.empty(); }
};

struct ResultRecord {
  std::string id;
  std::string group;
  std::vector<double> scores;  // by the benchmark's metrics
  int prompt_tokens = 0;
  int decoded_prompt_tokens = 0;  // of the prompt's last tokens, fed in decode mode
  int answer_tokens = 0;
  double context_tokens = 0;              // mean of the decode steps
  std::optional<SparsityUsage> sparsity;  // null: dense
  LayerShares layers;
  nlohmann::json facts = nlohmann::json::object();
  // Written, and left out when read back.
  std::string answer;
  std::vector<std::string> references;

  // Decode steps: the last token of an answer is not fed.
  int num_steps() const { return decoded_prompt_tokens + std::max(0, answer_tokens - 1); }
};

// What a file holds under one policy.
struct PolicyResults {
  EvalPolicy policy;
  std::vector<ResultRecord> records;
};

// Every policy that has results under these parameters in the files *.jsonl of `folder`: dense
// first, then by name. Where a file has results of two bodies, those of the later one.
[[nodiscard]] StatusOr<std::vector<PolicyResults>> CollectResults(
    const std::filesystem::path& folder, const nlohmann::json& parameters);

class ResultFile {
 public:
  // Reads what `path` holds of this run, or makes it. A line that was cut off by a crash is left
  // out. Errors: kUnavailable naming the path.
  [[nodiscard]] static StatusOr<ResultFile> Open(const std::filesystem::path& path,
                                                 const nlohmann::json& parameters,
                                                 const EvalPolicy& policy);

  bool Has(const std::string& id) const { return ids_.contains(id); }
  const std::vector<ResultRecord>& records() const { return records_; }

  // Writes the record through to the file.
  [[nodiscard]] Status Append(ResultRecord record);

 private:
  ResultFile() = default;

  std::filesystem::path path_;
  std::string run_;
  std::ofstream stream_;
  std::vector<ResultRecord> records_;
  std::set<std::string> ids_;  // of the records
};

}  // namespace gloam
