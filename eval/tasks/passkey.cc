#include <algorithm>

#include "eval/metrics.h"
#include "eval/random.h"
#include "eval/tasks/haystack.h"
#include "eval/tasks/tasks.h"
#include "eval/words.h"
#include "fmt/format.h"

namespace gloam {
namespace {

constexpr int kMaxAnswerTokens = 16;  // five digits, whatever the tokenizer, and what leads to them
constexpr int kMaxSentences = 1 << 20;

class PasskeyTask final : public Task {
 public:
  PasskeyTask(PasskeyOptions options, PromptTokenizer& tokenizer)
      : options_(std::move(options)), common_(options_.common), tokenizer_(tokenizer) {}

  std::string_view name() const override { return "passkey"; }
  nlohmann::json parameters() const override {
    return {{"lengths", common_.lengths},     {"depths", options_.depths},
            {"samples", common_.num_samples}, {"seed", common_.seed},
            {"chat", common_.chat},           {"answer_tokens", MaxAnswerTokens()}};
  }
  std::vector<std::string> metrics() const override { return {"exact"}; }
  int num_items() const override {
    return static_cast<int>(common_.lengths.size() * options_.depths.size()) * common_.num_samples;
  }
  std::string ItemId(int index) const override {
    const Cell cell = CellOf(index);
    return fmt::format("{}/{:.4f}/{}", cell.length, cell.depth, cell.sample);
  }

  StatusOr<EvalItem> MakeItem(int index) override {
    const Cell cell = CellOf(index);
    EvalItem item;
    item.id = ItemId(index);
    item.group = fmt::format("{}", cell.length);
    Random random(common_.seed, "passkey/" + item.id);
    const std::string key = RandomDigits(random, 5);
    const auto make = [&](int size) -> PromptText {
      int i = 0;
      const std::string needle =
          fmt::format("The pass key is {0}. Keep it in mind: {0} is the pass key.", key);
      return {
          .context =
              "One thing that matters is hidden in a long and dull text. Find it and "
              "keep it in mind; you will be asked about it.\n\n" +
              BuildHaystack(size, {{cell.depth, needle}}, [&i] { return RepeatedSentence(i++); }),
          .question = "\n\nWhat is the pass key that the text mentions?",
          .answer_prefix = common_.chat ? "The pass key is" : "\nThe pass key is"};
    };
    item.max_tokens = MaxAnswerTokens();
    GLOAM_ASSIGN_OR_RETURN(
        FittedPrompt fitted,
        FitPrompt(tokenizer_, common_.chat, cell.length - item.max_tokens, kMaxSentences, make));
    item.prompt = std::move(fitted.prompt);
    item.references = {key};
    item.facts = {{"length", cell.length}, {"depth", cell.depth}};
    return item;
  }

  std::vector<double> Score(const EvalItem& item, std::string_view answer) const override {
    constexpr std::string_view kDigits = "0123456789";
    const size_t begin = std::min(answer.find_first_of(kDigits), answer.size());
    const size_t end = std::min(answer.find_first_not_of(kDigits, begin), answer.size());
    return {answer.substr(begin, end - begin) == item.references.front() ? 1.0 : 0.0};
  }

 private:
  struct Cell {
    int length = 0;
    double depth = 0;
    int sample = 0;
  };
  Cell CellOf(int index) const {
    const int num_depths = static_cast<int>(options_.depths.size());
    const int cell = index / common_.num_samples;
    return {common_.lengths[static_cast<size_t>(cell / num_depths)],
            options_.depths[static_cast<size_t>(cell % num_depths)], index % common_.num_samples};
  }
  int MaxAnswerTokens() const {
    return common_.max_answer_tokens > 0 ? common_.max_answer_tokens : kMaxAnswerTokens;
  }

  const PasskeyOptions options_;
  const TaskOptions& common_;
  PromptTokenizer& tokenizer_;
};

}  // namespace

std::unique_ptr<Task> MakePasskeyTask(PasskeyOptions options, PromptTokenizer& tokenizer) {
  return std::make_unique<PasskeyTask>(std::move(options), tokenizer);
}

}  // namespace gloam
