// Task: a benchmark as a list of items that are made one at a time, so that memory stays bounded,
// and the scores of answers to them. Implementations in eval/tasks/. One thread, but for Score.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "eval/prompt.h"
#include "nlohmann/json.hpp"

namespace gloam {

struct EvalItem {
  std::string id;     // unique within the task
  std::string group;  // the task's part that it counts to: a column of the table
  Prompt prompt;
  int max_tokens = 0;  // of the answer
  int min_tokens = 0;
  std::vector<int32_t> stop_token_ids;
  std::vector<std::string> references;
  std::vector<std::string> classes;                 // of a classification
  nlohmann::json facts = nlohmann::json::object();  // what results repeat: length, depth, ...
};

class Task {
 public:
  virtual ~Task() = default;

  virtual std::string_view name() const = 0;  // "passkey"

  // All that decides the items and their scores; results under equal parameters can be compared.
  virtual nlohmann::json parameters() const = 0;

  // Names of what Score gives; the first is the score that tables and plots show.
  virtual std::vector<std::string> metrics() const = 0;

  virtual int num_items() const = 0;
  virtual std::string ItemId(int index) const = 0;
  [[nodiscard]] virtual StatusOr<EvalItem> MakeItem(int index) = 0;

  // One value from 0 to 1 for each of metrics().
  virtual std::vector<double> Score(const EvalItem& item, std::string_view answer) const = 0;
};

}  // namespace gloam
