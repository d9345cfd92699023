#include "eval/runner.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "base/check.h"

namespace gloam {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ResultRecord MakeRecord(const Task& task, const EvalItem& item, GeneratedText generated) {
  ResultRecord record;
  record.id = item.id;
  record.group = item.group;
  record.scores = task.Score(item, generated.text);
  record.prompt_tokens = item.prompt.num_tokens();
  record.decoded_prompt_tokens = item.prompt.num_decoded;
  record.answer_tokens = generated.num_tokens;
  // Steps see the contexts from the first decoded token's to that of the answer's last but one.
  record.context_tokens =
      item.prompt.num_tokens() + (generated.num_tokens - item.prompt.num_decoded) / 2.0;
  record.sparsity = std::move(generated.sparsity);
  if (record.sparsity && record.sparsity->context_tokens == 0) {
    record.sparsity->context_tokens = record.context_tokens;  // servers do not tell
  }
  record.facts = item.facts;
  record.answer = std::move(generated.text);
  record.references = item.references;
  return record;
}

// One item under the policies that lack it, `concurrency` at a time; the first goes alone.
Status RunItem(const Task& task, const EvalItem& item, TextGenerator& generator,
               const std::vector<size_t>& missing, int concurrency, ResultSet& results,
               std::string* summary) {
  std::vector<StatusOr<GeneratedText>> answers(missing.size(), GeneratedText());
  const auto answer = [&](size_t i) {
    answers[i] = generator.Generate({.prompt = item.prompt.tokens,
                                     .num_decoded_prompt_tokens = item.prompt.num_decoded,
                                     .max_tokens = item.max_tokens,
                                     .min_tokens = item.min_tokens,
                                     .stop_token_ids = item.stop_token_ids,
                                     .policy = results.policies()[missing[i]].body});
  };
  answer(0);
  std::atomic<size_t> next{1};
  std::vector<std::thread> threads;
  const size_t num_threads =
      std::min(missing.size() - 1, static_cast<size_t>(std::max(1, concurrency)));
  for (size_t i = 0; i < num_threads; ++i) {
    threads.emplace_back([&] {
      for (size_t j; (j = next.fetch_add(1)) < missing.size();) answer(j);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < missing.size(); ++i) {
    const std::string& name = results.policies()[missing[i]].name;
    if (!answers[i].ok()) {
      return Status(answers[i].status().code(),
                    fmt::format("{} under {}: {}", item.id, name, MessageOf(answers[i].status())));
    }
    ResultRecord record = MakeRecord(task, item, *std::move(answers[i]));
    *summary += fmt::format("  {} {:.2f}", name, record.scores.front());
    GLOAM_RETURN_IF_ERROR(results.Append(missing[i], std::move(record)));
  }
  return OkStatus();
}

Status RunItems(Task& task, TextGenerator& generator, const RunOptions& options,
                ResultSet& results) {
  Progress progress(task.num_items(), options.progress);
  for (int i = 0; i < task.num_items(); ++i) {
    const auto missing = results.Missing(task.ItemId(i));
    if (missing.empty()) continue;
    GLOAM_ASSIGN_OR_RETURN(const EvalItem item, task.MakeItem(i));
    std::string summary = fmt::format("{} {}:", task.name(), item.id);
    GLOAM_RETURN_IF_ERROR(
        RunItem(task, item, generator, missing, options.concurrency, results, &summary));
    progress.ItemDone(i, summary);
  }
  return OkStatus();
}

}  // namespace

StatusOr<ResultSet> ResultSet::Open(const std::filesystem::path& folder,
                                    const nlohmann::json& parameters,
                                    const std::vector<EvalPolicy>& policies) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return Unavailable("cannot make {}: {}", folder.string(), error.message());
  ResultSet set;
  set.policies_ = policies;
  for (const EvalPolicy& policy : policies) {
    GLOAM_ASSIGN_OR_RETURN(ResultFile file,
                           ResultFile::Open(folder / (policy.name + ".jsonl"), parameters, policy));
    set.files_.push_back(std::move(file));
  }
  return set;
}

std::vector<size_t> ResultSet::Missing(const std::string& id) const {
  std::vector<size_t> missing;
  for (size_t i = 0; i < files_.size(); ++i) {
    if (!files_[i].Has(id)) missing.push_back(i);
  }
  return missing;
}

Status ResultSet::Append(size_t policy, ResultRecord record) {
  return files_[policy].Append(std::move(record));
}

std::vector<PolicyResults> ResultSet::Results() const {
  std::vector<PolicyResults> results;
  for (size_t i = 0; i < files_.size(); ++i) results.push_back({policies_[i], files_[i].records()});
  return results;
}

Progress::Progress(int num_items, std::function<void(const std::string&)> print)
    : num_items_(num_items), print_(std::move(print)), start_(Now()) {}

void Progress::ItemDone(int index, const std::string& text) {
  ++num_run_;
  if (!print_) return;
  const double seconds = (Now() - start_) / num_run_ * (num_items_ - index - 1);
  print_(fmt::format("[{}/{}] {}  ({:.0f} min {:02.0f} s left)", index + 1, num_items_, text,
                     std::floor(seconds / 60), std::fmod(seconds, 60)));
}

StatusOr<std::string> RunTask(Task& task, TextGenerator& generator,
                              const std::vector<EvalPolicy>& policies, const RunOptions& options) {
  GLOAM_CHECK(!policies.empty() && policies.front().dense());
  const nlohmann::json parameters = {{"benchmark", task.name()},
                                     {"task", task.parameters()},
                                     {"model", generator.model_name()},
                                     {"settings", generator.settings()}};
  GLOAM_ASSIGN_OR_RETURN(ResultSet results, ResultSet::Open(options.folder, parameters, policies));
  GLOAM_RETURN_IF_ERROR(RunItems(task, generator, options, results));
  GLOAM_ASSIGN_OR_RETURN(ResultSet controls, ResultSet::Open(options.folder, parameters,
                                                             ControlsFor(results.Results())));
  GLOAM_RETURN_IF_ERROR(RunItems(task, generator, options, controls));

  ReportSpec spec{.title = fmt::format("{}: {}", task.name(), generator.model_name()),
                  .group_title = "part",
                  .parameters = parameters};
  for (const std::string& metric : task.metrics()) spec.metrics.push_back({.title = metric});
  return WriteReport(options.folder, spec, /*passkey_maps=*/task.name() == "passkey");
}

}  // namespace gloam
