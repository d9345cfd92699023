// Runs a benchmark: every item under every policy, then the matched-budget controls, then the
// report. What the result files hold already is not run again.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/status.h"
#include "eval/generator.h"
#include "eval/report.h"
#include "eval/task.h"

namespace gloam {

struct RunOptions {
  std::filesystem::path folder;  // made where it does not exist
  int concurrency = 4;           // requests at a time, all about the same item
  std::function<void(const std::string& line)> progress;  // one line per item
};

// The open result files of several policies.
class ResultSet {
 public:
  [[nodiscard]] static StatusOr<ResultSet> Open(const std::filesystem::path& folder,
                                                const nlohmann::json& parameters,
                                                const std::vector<EvalPolicy>& policies);

  const std::vector<EvalPolicy>& policies() const { return policies_; }
  // Indices of the policies that have no result of this item.
  std::vector<size_t> Missing(const std::string& id) const;
  [[nodiscard]] Status Append(size_t policy, ResultRecord record);
  std::vector<PolicyResults> Results() const;

 private:
  std::vector<EvalPolicy> policies_;
  std::vector<ResultFile> files_;
};

// The time that is left, from the items done so far.
class Progress {
 public:
  Progress(int num_items, std::function<void(const std::string&)> print);
  void ItemDone(int index, const std::string& text);

 private:
  const int num_items_;
  const std::function<void(const std::string&)> print_;
  const double start_;
  int num_run_ = 0;
};

// `policies` begin with dense. The first policy of an item goes alone, so that the others find its
// context in the prefix cache. Returns the table. Errors: of an item that cannot be made or
// answered; results so far are kept.
[[nodiscard]] StatusOr<std::string> RunTask(Task& task, TextGenerator& generator,
                                            const std::vector<EvalPolicy>& policies,
                                            const RunOptions& options);

}  // namespace gloam
