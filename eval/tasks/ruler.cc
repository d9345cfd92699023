#include <algorithm>
#include <cmath>
#include <functional>

#include "eval/metrics.h"
#include "eval/random.h"
#include "eval/tasks/haystack.h"
#include "eval/tasks/ruler_kinds.h"
#include "eval/tasks/tasks.h"
#include "fmt/format.h"

namespace gloam {
namespace {

constexpr int kMaxSize = 1 << 20;

class RulerTask final : public Task {
 public:
  RulerTask(RulerOptions options, std::vector<const RulerKind*> kinds, PromptTokenizer& tokenizer)
      : options_(std::move(options)), kinds_(std::move(kinds)), tokenizer_(tokenizer) {}

  std::string_view name() const override { return "ruler"; }
  nlohmann::json parameters() const override {
    const TaskOptions& common = options_.common;
    std::vector<std::string_view> names;
    for (const RulerKind* kind : kinds_) names.push_back(kind->name);
    uint64_t haystack = 0;
    for (const std::string& sentence : common.haystack)
      haystack = haystack * 31 + HashText(sentence);
    uint64_t questions = 0;
    for (const QaQuestion& qa : options_.qa.questions)
      questions = questions * 31 + HashText(qa.question);
    return {{"lengths", common.lengths},
            {"kinds", names},
            {"samples", common.num_samples},
            {"seed", common.seed},
            {"chat", common.chat},
            {"answer_tokens", common.max_answer_tokens},
            {"haystack", fmt::format("{:016x}", haystack)},
            {"qa", fmt::format("{:016x}", questions)}};
  }
  std::vector<std::string> metrics() const override { return {"found"}; }
  int num_items() const override {
    return static_cast<int>(kinds_.size() * options_.common.lengths.size()) *
           options_.common.num_samples;
  }
  std::string ItemId(int index) const override {
    const Cell cell = CellOf(index);
    return fmt::format("{}/{}/{}", cell.kind->name, cell.length, cell.sample);
  }

  StatusOr<EvalItem> MakeItem(int index) override {
    const Cell cell = CellOf(index);
    EvalItem item;
    item.id = ItemId(index);
    item.group = fmt::format("{} {}", cell.kind->name, cell.length);
    item.max_tokens = options_.common.max_answer_tokens > 0 ? options_.common.max_answer_tokens
                                                            : cell.kind->max_answer_tokens;
    item.facts = {{"kind", cell.kind->name}, {"length", cell.length}};
    const RulerContext context = {.id = "ruler/" + item.id,
                                  .seed = options_.common.seed,
                                  .sample = cell.sample,
                                  .length = cell.length,
                                  .haystack = options_.common.haystack,
                                  .qa = options_.qa};
    RulerItem made = cell.kind->make(context);
    const auto make = [&](int size) {
      PromptText text = made.text(size);
      // As plain text the answer begins on a line of its own.
      if (!options_.common.chat) text.answer_prefix = "\n" + text.answer_prefix;
      return text;
    };
    auto fitted = FitPrompt(tokenizer_, options_.common.chat, cell.length - item.max_tokens,
                            std::min(kMaxSize, made.max_size), make);
    if (!fitted.ok()) {
      return InvalidArgument("{}: {}", item.id, MessageOf(fitted.status()));
    }
    item.prompt = std::move(fitted->prompt);
    item.references = std::move(made.references);
    item.facts["size"] = fitted->size;
    return item;
  }

  std::vector<double> Score(const EvalItem& item, std::string_view answer) const override {
    const bool question = item.facts.at("kind") == kQuestionKind;
    return {question ? ContainsAny(answer, item.references)
                     : ContainedShare(answer, item.references)};
  }

 private:
  struct Cell {
    const RulerKind* kind = nullptr;
    int length = 0;
    int sample = 0;
  };
  Cell CellOf(int index) const {
    const int num_lengths = static_cast<int>(options_.common.lengths.size());
    const int cell = index / options_.common.num_samples;
    return {kinds_[static_cast<size_t>(cell / num_lengths)],
            options_.common.lengths[static_cast<size_t>(cell % num_lengths)],
            index % options_.common.num_samples};
  }

  const RulerOptions options_;
  const std::vector<const RulerKind*> kinds_;
  PromptTokenizer& tokenizer_;
};

}  // namespace

std::vector<std::string> RulerKinds() {
  std::vector<std::string> names;
  for (const RulerKind& kind : AllRulerKinds()) names.emplace_back(kind.name);
  return names;
}

StatusOr<std::unique_ptr<Task>> MakeRulerTask(RulerOptions options, PromptTokenizer& tokenizer) {
  const bool has_qa = !options.qa.questions.empty();
  std::vector<const RulerKind*> kinds;
  for (const RulerKind& kind : AllRulerKinds()) {
    if (options.kinds.empty() && (kind.name != kQuestionKind || has_qa)) kinds.push_back(&kind);
  }
  for (const std::string& name : options.kinds) {
    const auto all = AllRulerKinds();
    const auto kind =
        std::find_if(all.begin(), all.end(), [&](const auto& entry) { return entry.name == name; });
    if (kind == all.end()) {
      return InvalidArgument("'{}' is not a kind of RULER task: {}", name,
                             fmt::join(RulerKinds(), ", "));
    }
    if (name == kQuestionKind && !has_qa) {
      return InvalidArgument("the kind '{}' needs --qa-data", name);
    }
    kinds.push_back(&*kind);
  }
  return std::make_unique<RulerTask>(std::move(options), std::move(kinds), tokenizer);
}

StatusOr<QaData> ParseQaData(std::string_view text) {
  using nlohmann::json;
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object() || !root.contains("data") || !root["data"].is_array()) {
    return InvalidArgument("question data: no object with an array 'data' as in SQuAD");
  }
  QaData data;
  try {
    for (const json& article : root["data"]) {
      for (const json& paragraph : article.at("paragraphs")) {
        const int index = static_cast<int>(data.paragraphs.size());
        data.paragraphs.push_back({paragraph.at("context").get<std::string>()});
        for (const json& qa : paragraph.at("qas")) {
          if (qa.value("is_impossible", false)) continue;
          QaQuestion question{qa.at("question").get<std::string>(), {}, index};
          for (const json& answer : qa.at("answers")) {
            question.answers.push_back(answer.at("text").get<std::string>());
          }
          if (!question.answers.empty()) data.questions.push_back(std::move(question));
        }
      }
    }
  } catch (const json::exception& error) {
    return InvalidArgument("question data: {}", error.what());
  }
  if (data.questions.empty()) return InvalidArgument("question data: no question has an answer");
  return data;
}

}  // namespace gloam
