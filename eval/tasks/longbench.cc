#include <algorithm>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include "base/check.h"
#include "eval/metrics.h"
#include "eval/tasks/tasks.h"
#include "fmt/format.h"
#include "fmt/ranges.h"

namespace gloam {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

enum class Metric {
  kF1,
  kRouge,
  kClassification,
  kRetrievalEn,
  kRetrievalZh,
  kCount,
  kCode,
  kNeedsSegmentation,  // of Chinese words
};

struct DatasetKind {
  std::string_view name;
  Metric metric;
  bool chat_template = true;  // false: published as plain text even for chat models
  bool first_line = false;    // only the answer's first line counts
};

// LongBench's own table of metrics and exceptions.
constexpr DatasetKind kDatasets[] = {{"narrativeqa", Metric::kF1},
                                     {"qasper", Metric::kF1},
                                     {"multifieldqa_en", Metric::kF1},
                                     {"multifieldqa_zh", Metric::kNeedsSegmentation},
                                     {"hotpotqa", Metric::kF1},
                                     {"2wikimqa", Metric::kF1},
                                     {"musique", Metric::kF1},
                                     {"dureader", Metric::kNeedsSegmentation},
                                     {"gov_report", Metric::kRouge},
                                     {"qmsum", Metric::kRouge},
                                     {"multi_news", Metric::kRouge},
                                     {"vcsum", Metric::kNeedsSegmentation},
                                     {"trec", Metric::kClassification, false, true},
                                     {"triviaqa", Metric::kF1, false, true},
                                     {"samsum", Metric::kRouge, false, true},
                                     {"lsht", Metric::kClassification, false, true},
                                     {"passage_retrieval_en", Metric::kRetrievalEn},
                                     {"passage_count", Metric::kCount},
                                     {"passage_retrieval_zh", Metric::kRetrievalZh},
                                     {"lcc", Metric::kCode, false},
                                     {"repobench-p", Metric::kCode, false}};

constexpr std::string_view kStopAtLineEnd = "samsum";  // as published

const DatasetKind* FindKind(std::string_view name) {
  const auto found = std::find_if(std::begin(kDatasets), std::end(kDatasets),
                                  [&](const DatasetKind& kind) { return kind.name == name; });
  return found == std::end(kDatasets) ? nullptr : found;
}

double ScoreOne(Metric metric, std::string_view answer, const std::string& reference,
                const std::vector<std::string>& classes) {
  switch (metric) {
    case Metric::kF1:
      return TokenF1(answer, reference);
    case Metric::kRouge:
      return RougeL(answer, reference);
    case Metric::kClassification:
      return ClassificationScore(answer, reference, classes);
    case Metric::kRetrievalEn:
      return RetrievalScore(answer, reference, "Paragraph ");
    case Metric::kRetrievalZh:
      return RetrievalScore(answer, reference, "\u6bb5\u843d");
    case Metric::kCount:
      return CountScore(answer, reference);
    case Metric::kCode:
      return CodeSimilarity(answer, reference);
    case Metric::kNeedsSegmentation:
      break;
  }
  GLOAM_CHECK(false);  // refused when the task was made
  return 0;
}

// `file` in the folder or in the folder's `part`.
std::optional<fs::path> FindFile(const fs::path& folder, std::string_view part,
                                 const std::string& file) {
  std::error_code error;
  for (const fs::path& path : {folder / file, folder / part / file}) {
    if (fs::is_regular_file(path, error)) return path;
  }
  return std::nullopt;
}

StatusOr<json> ReadJsonObject(const fs::path& folder, const std::string& file) {
  const auto path = FindFile(folder, "config", file);
  if (!path) {
    return NotFound("{} has no {}, nor has its folder config", folder.string(), file);
  }
  std::ifstream stream(*path, std::ios::binary);
  json object = json::parse(stream, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return InvalidArgument("{} is not a JSON object", path->string());
  return object;
}

// One data set: where its lines are, and how its prompts are made.
struct Dataset {
  const DatasetKind* kind = nullptr;
  fs::path path;
  std::vector<int64_t> line_offsets;
  std::string prompt_format;  // with {context} and {input}
  int max_tokens = 0;
};

// Offsets of the lines that are not empty, at most `limit` of them where it is not 0.
StatusOr<std::vector<int64_t>> FindLines(const fs::path& path, int limit) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return NotFound("cannot read {}", path.string());
  std::vector<int64_t> offsets;
  std::string line;
  for (int64_t offset = 0; std::getline(stream, line); offset = stream.tellg()) {
    if (!Trim(line).empty()) offsets.push_back(offset);
    if (limit > 0 && static_cast<int>(offsets.size()) == limit) break;
    if (stream.eof()) break;
  }
  if (offsets.empty()) return InvalidArgument("{} is empty", path.string());
  return offsets;
}

StatusOr<Dataset> OpenDataset(const LongBenchOptions& options, const std::string& name,
                              const json& prompts, const json& max_lengths) {
  Dataset dataset;
  dataset.kind = FindKind(name);
  if (dataset.kind == nullptr) return InvalidArgument("'{}' is no data set of LongBench", name);
  if (dataset.kind->metric == Metric::kNeedsSegmentation) {
    return Unimplemented("{}: its metric needs a segmentation of Chinese text into words", name);
  }
  const auto path = FindFile(options.folder, "data", name + ".jsonl");
  if (!path) return NotFound("{} has no {}.jsonl", options.folder.string(), name);
  dataset.path = *path;
  if (!prompts.contains(name) || !prompts[name].is_string()) {
    return InvalidArgument("dataset2prompt.json has no text for '{}'", name);
  }
  if (!max_lengths.contains(name) || !max_lengths[name].is_number_integer()) {
    return InvalidArgument("dataset2maxlen.json has no number for '{}'", name);
  }
  dataset.prompt_format = prompts[name].get<std::string>();
  dataset.max_tokens = max_lengths[name].get<int>();
  GLOAM_ASSIGN_OR_RETURN(dataset.line_offsets, FindLines(dataset.path, options.num_samples));
  return dataset;
}

// `format` with {name} replaced; the placeholders are those of `values`.
std::string Fill(std::string_view format, const std::map<std::string, std::string>& values) {
  std::string text;
  while (!format.empty()) {
    const size_t open = std::min(format.find('{'), format.size());
    text += format.substr(0, open);
    format.remove_prefix(open);
    if (format.empty()) break;
    const size_t close = format.find('}');
    const auto value =
        close == format.npos ? values.end() : values.find(std::string(format.substr(1, close - 1)));
    if (value == values.end()) {
      text += format.front();
      format.remove_prefix(1);
    } else {
      text += value->second;
      format.remove_prefix(close + 1);
    }
  }
  return text;
}

class LongBenchTask final : public Task {
 public:
  LongBenchTask(LongBenchOptions options, std::vector<Dataset> datasets, PromptTokenizer& tokenizer)
      : options_(std::move(options)), datasets_(std::move(datasets)), tokenizer_(tokenizer) {}

  std::string_view name() const override { return "longbench"; }
  json parameters() const override {
    json sets = json::object();
    for (const Dataset& dataset : datasets_) {
      sets[std::string(dataset.kind->name)] = {{"items", dataset.line_offsets.size()},
                                               {"max_tokens", dataset.max_tokens},
                                               {"prompt", dataset.prompt_format}};
    }
    return {{"datasets", sets},
            {"max_prompt_tokens", options_.max_prompt_tokens},
            {"chat", options_.chat}};
  }
  std::vector<std::string> metrics() const override { return {"score"}; }
  int num_items() const override {
    size_t count = 0;
    for (const Dataset& dataset : datasets_) count += dataset.line_offsets.size();
    return static_cast<int>(count);
  }
  std::string ItemId(int index) const override {
    const auto [dataset, line] = Locate(index);
    return fmt::format("{}/{}", dataset->kind->name, line);
  }

  StatusOr<EvalItem> MakeItem(int index) override {
    const auto [dataset, line] = Locate(index);
    EvalItem item;
    item.id = ItemId(index);
    item.group = dataset->kind->name;
    item.max_tokens = dataset->max_tokens;
    GLOAM_ASSIGN_OR_RETURN(const json row, ReadRow(*dataset, line));
    std::string context, input;
    try {
      context = row.at("context").get<std::string>();
      input = row.at("input").get<std::string>();
      item.references = row.at("answers").get<std::vector<std::string>>();
      if (const auto classes = row.find("all_classes");
          classes != row.end() && classes->is_array()) {
        item.classes = classes->get<std::vector<std::string>>();
      }
    } catch (const json::exception& error) {
      return InvalidArgument("{}, item {}: {}", dataset->path.string(), line, error.what());
    }
    GLOAM_ASSIGN_OR_RETURN(item.prompt, MakePrompt(*dataset, context, input));
    if (dataset->kind->name == kStopAtLineEnd) {
      GLOAM_ASSIGN_OR_RETURN(const auto line_end, tokenizer_.Encode("\n", /*add_special=*/false));
      if (!line_end.empty()) item.stop_token_ids = {line_end.back()};
      item.min_tokens = 1;
    }
    item.facts = {{"dataset", dataset->kind->name}, {"words", row.value("length", 0)}};
    return item;
  }

  std::vector<double> Score(const EvalItem& item, std::string_view answer) const override {
    const DatasetKind& kind = *FindKind(item.group);
    if (kind.first_line) {
      answer.remove_prefix(std::min(answer.find_first_not_of('\n'), answer.size()));
      answer = answer.substr(0, answer.find('\n'));
    }
    double best = 0;
    for (const std::string& reference : item.references) {
      best = std::max(best, ScoreOne(kind.metric, answer, reference, item.classes));
    }
    return {best};
  }

 private:
  std::pair<const Dataset*, int> Locate(int index) const {
    for (const Dataset& dataset : datasets_) {
      const auto size = static_cast<int>(dataset.line_offsets.size());
      if (index < size) return {&dataset, index};
      index -= size;
    }
    GLOAM_CHECK(false);
    return {};
  }

  static StatusOr<json> ReadRow(const Dataset& dataset, int line) {
    std::ifstream stream(dataset.path, std::ios::binary);
    stream.seekg(dataset.line_offsets[static_cast<size_t>(line)]);
    std::string text;
    std::getline(stream, text);
    json row = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!row.is_object()) {
      return InvalidArgument("{}, item {}: not a JSON object", dataset.path.string(), line);
    }
    return row;
  }

  // The prompt; of one that is too long the first and the last half of what is allowed.
  StatusOr<Prompt> MakePrompt(const Dataset& dataset, const std::string& context,
                              const std::string& input) {
    // What comes after the context is fed in decode mode.
    constexpr std::string_view kContext = "{context}";
    const std::string& format = dataset.prompt_format;
    const size_t at = format.find(kContext);
    const size_t split = at == format.npos ? format.size() : at + kContext.size();
    const std::map<std::string, std::string> values = {{"context", context}, {"input", input}};
    std::string text = Fill(std::string_view(format).substr(0, split), values);
    const std::string question = Fill(std::string_view(format).substr(split), values);
    text += question;

    GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                           tokenizer_.Encode(text, /*add_special=*/false));
    if (static_cast<int>(tokens.size()) > options_.max_prompt_tokens) {
      const auto half = static_cast<size_t>(options_.max_prompt_tokens / 2);
      const std::span<const int32_t> all(tokens);
      GLOAM_ASSIGN_OR_RETURN(text, tokenizer_.Decode(all.first(half)));
      GLOAM_ASSIGN_OR_RETURN(const std::string end, tokenizer_.Decode(all.last(half)));
      text += end;
    }
    const bool whole = text.size() > question.size() && text.ends_with(question);
    const size_t context_bytes = whole ? text.size() - question.size() : text.size();
    const bool chat = options_.chat && dataset.kind->chat_template;
    return BuildPrompt(
        tokenizer_,
        {.context = text.substr(0, context_bytes), .question = text.substr(context_bytes)}, chat);
  }

  const LongBenchOptions options_;
  const std::vector<Dataset> datasets_;
  PromptTokenizer& tokenizer_;
};

}  // namespace

StatusOr<std::unique_ptr<Task>> MakeLongBenchTask(LongBenchOptions options,
                                                  PromptTokenizer& tokenizer) {
  GLOAM_ASSIGN_OR_RETURN(const json prompts, ReadJsonObject(options.folder, "dataset2prompt.json"));
  GLOAM_ASSIGN_OR_RETURN(const json lengths, ReadJsonObject(options.folder, "dataset2maxlen.json"));
  std::vector<std::string> names = options.datasets;
  if (names.empty()) {
    for (const DatasetKind& kind : kDatasets) {
      const std::string file = fmt::format("{}.jsonl", kind.name);
      if (kind.metric != Metric::kNeedsSegmentation && FindFile(options.folder, "data", file)) {
        names.emplace_back(kind.name);
      }
    }
    if (names.empty()) {
      return NotFound("{} holds none of LongBench's files DATASET.jsonl", options.folder.string());
    }
  }
  std::vector<Dataset> datasets;
  for (const std::string& name : names) {
    GLOAM_ASSIGN_OR_RETURN(datasets.emplace_back(), OpenDataset(options, name, prompts, lengths));
  }
  return std::make_unique<LongBenchTask>(std::move(options), std::move(datasets), tokenizer);
}

}  // namespace gloam
