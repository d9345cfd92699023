#include "eval/tasks/ruler_kinds.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <utility>

#include "eval/random.h"
#include "eval/tasks/haystack.h"
#include "eval/words.h"
#include "fmt/format.h"
#include "fmt/ranges.h"

namespace gloam {
namespace {

// "a", "a and b", "a, b and c"
std::string Enumerate(const std::vector<std::string>& names) {
  std::string text = names.front();
  for (size_t i = 1; i < names.size(); ++i) {
    text += (i + 1 == names.size() ? " and " : ", ") + names[i];
  }
  return text;
}

// ---- Needles: secrets with a name -------------------------------------------------------------

enum class Filler { kRepeated, kProse, kNeedles };

struct NeedleKind {
  Filler filler = Filler::kProse;
  bool uuid_names = false;
  bool uuid_values = false;
  int num_names = 1;   // needles with different names
  int num_values = 1;  // needles with the same name
  int num_asked = 1;   // names that are asked for
};

class SecretMaker {
 public:
  SecretMaker(const NeedleKind& kind, uint64_t seed, std::string_view name)
      : kind_(kind), random_(seed, name), names_(random_) {}
  std::string Name() { return kind_.uuid_names ? RandomUuid(random_) : names_.Next(); }
  std::string Value() { return kind_.uuid_values ? RandomUuid(random_) : RandomDigits(random_, 7); }
  std::string Needle(const std::string& name, const std::string& value) const {
    return fmt::format("The secret {} of {} is {}.", What(), name, value);
  }
  std::string_view What() const { return kind_.uuid_values ? "code" : "number"; }
  Random& random() { return random_; }

 private:
  const NeedleKind kind_;
  Random random_;
  NameMaker names_;
};

RulerItem MakeNeedles(const RulerContext& context, const NeedleKind& kind) {
  SecretMaker secrets(kind, context.seed, context.id);
  RulerItem item;
  std::vector<std::string> names, sentences;
  for (int i = 0; i < kind.num_names; ++i) {
    const std::string name = secrets.Name();
    for (int j = 0; j < kind.num_values; ++j) {
      const std::string value = secrets.Value();
      sentences.push_back(secrets.Needle(name, value));
      if (i < kind.num_asked) item.references.push_back(value);
    }
    if (i < kind.num_asked) names.push_back(name);
  }
  secrets.random().Shuffle(sentences);
  const auto depths = RandomDepths(secrets.random(), static_cast<int>(sentences.size()));
  std::vector<Needle> needles;
  for (size_t i = 0; i < sentences.size(); ++i) needles.push_back({depths[i], sentences[i]});

  const bool plural = item.references.size() > 1;
  const std::string what = fmt::format("{}{}", secrets.What(), plural ? "s" : "");
  const std::string subject = fmt::format("secret {} of {}", what, Enumerate(names));
  item.text = [kind, context, needles, what, subject, plural](int size) -> PromptText {
    int next = 0;
    ProseFiller prose(context.haystack, context.seed, context.id + "/filler");
    SecretMaker others(kind, context.seed, context.id + "/others");
    const auto filler = [&]() -> std::string {
      if (kind.filler == Filler::kRepeated) return std::string(RepeatedSentence(next++));
      if (kind.filler == Filler::kProse) return prose.Next();
      const std::string name = others.Name();
      return others.Needle(name, others.Value());
    };
    return {.context = fmt::format("Secret {}s are hidden in the text below. Read it closely and "
                                   "remember them; a question about them follows.\n\n",
                                   kind.uuid_values ? "code" : "number") +
                       BuildHaystack(size, needles, filler),
            .question = fmt::format("\n\nWhich {} does the text above tell? Name {}.", subject,
                                    plural ? "all of them" : "it"),
            .answer_prefix = fmt::format("The {} {}", subject, plural ? "are" : "is")};
  };
  return item;
}

template <NeedleKind kKind>
RulerItem MakeNeedlesOf(const RulerContext& context) {
  return MakeNeedles(context, kKind);
}

// ---- Variable tracking ------------------------------------------------------------------------

constexpr int kHops = 4;

// A chain of assignments: who holds `value` in the end.
struct Chain {
  std::string value;
  std::vector<std::string> names;
  std::vector<std::string> statements;
};

Chain MakeChain(Random& random) {
  Chain chain{.value = RandomDigits(random, 5)};
  std::set<std::string> used;
  while (static_cast<int>(chain.names.size()) < kHops + 1) {
    std::string name;
    for (int i = 0; i < 5; ++i) name += static_cast<char>('A' + random.Below(26));
    if (used.insert(name).second) chain.names.push_back(name);
  }
  chain.statements.push_back(fmt::format("VAR {} = {}.", chain.names[0], chain.value));
  for (size_t i = 1; i < chain.names.size(); ++i) {
    chain.statements.push_back(fmt::format("VAR {} = VAR {}.", chain.names[i], chain.names[i - 1]));
  }
  return chain;
}

PromptText ChainText(const Chain& chain, const std::vector<double>& depths, int size) {
  std::vector<Needle> needles;
  for (size_t i = 0; i < depths.size(); ++i) needles.push_back({depths[i], chain.statements[i]});
  int next = 0;
  return {.context =
              "Assignments to variables are scattered over the text below. Follow them from "
              "one variable to the next.\n\n" +
              BuildHaystack(size, needles, [&next] { return RepeatedSentence(next++); }),
          .question = fmt::format("\n\nWhich variables end up with the value {}? There are {}.",
                                  chain.value, chain.names.size()),
          .answer_prefix = fmt::format("The variables with the value {} are:", chain.value)};
}

RulerItem MakeVariableTracking(const RulerContext& context) {
  Random random(context.seed, context.id);
  const Chain example = MakeChain(random);
  const PromptText shown = ChainText(example, RandomDepths(random, kHops + 1), kHops + 1);
  const std::string example_text = fmt::format("{}{}\n{} {}\n\n", shown.context, shown.question,
                                               shown.answer_prefix, fmt::join(example.names, ", "));
  const Chain chain = MakeChain(random);
  const auto depths = RandomDepths(random, kHops + 1);
  RulerItem item;
  item.references = chain.names;
  item.text = [example_text, chain, depths](int size) {
    PromptText text = ChainText(chain, depths, size);
    text.context = example_text + text.context;
    return text;
  };
  return item;
}

// ---- Words to count ---------------------------------------------------------------------------

constexpr int kNumCommon = 10;

// How often words are in the list; shorter lists hold fewer repetitions, to fit.
struct Repetitions {
  int common = 0;
  int uncommon = 0;
};
Repetitions RepetitionsFor(int length) {
  if (length >= 4096) return {30, 3};  // RULER's own
  return length >= 2048 ? Repetitions{10, 1} : Repetitions{5, 1};
}

PromptText CommonWordsText(const std::vector<std::string>& common,
                           const std::vector<std::string>& uncommon, Repetitions repetitions,
                           Random random) {
  std::vector<std::string> list;
  for (const auto& word : common) list.insert(list.end(), repetitions.common, word);
  for (const auto& word : uncommon) list.insert(list.end(), repetitions.uncommon, word);
  random.Shuffle(list);
  std::string text =
      "Some words of the numbered list below come up much more often than the others. Remember "
      "them.\n\n";
  for (size_t i = 0; i < list.size(); ++i) {
    text += fmt::format("{}{}. {}", i == 0 ? "" : " ", i + 1, list[i]);
  }
  return {.context = std::move(text),
          .question =
              fmt::format("\n\nWhat are the {} words that the list has most often?", common.size()),
          .answer_prefix = fmt::format("The {} most frequent words are:", common.size())};
}

RulerItem MakeCommonWords(const RulerContext& context) {
  constexpr int kExampleUncommon = 20;
  Random random(context.seed, context.id);
  // Each uncommon word takes at least two tokens, so that is more than fit.
  const int max_uncommon = context.length / 2;
  const auto words = DistinctWords(random, 2 * kNumCommon + kExampleUncommon + max_uncommon);
  const auto slice = [&words](int begin, int count) {
    return std::vector<std::string>(words.begin() + begin, words.begin() + begin + count);
  };
  const auto example = slice(0, kNumCommon);
  const auto shown = CommonWordsText(example, slice(2 * kNumCommon, kExampleUncommon),
                                     {.common = 3, .uncommon = 1}, random);
  const std::string example_text = fmt::format("{}{}\n{} {}\n\n", shown.context, shown.question,
                                               shown.answer_prefix, fmt::join(example, ", "));
  RulerItem item;
  item.references = slice(kNumCommon, kNumCommon);
  item.max_size = max_uncommon;
  const auto rest = slice(2 * kNumCommon + kExampleUncommon, max_uncommon);
  item.text = [=, common = item.references](int size) {
    PromptText text =
        CommonWordsText(common, {rest.begin(), rest.begin() + size}, RepetitionsFor(context.length),
                        Random(context.seed, context.id + "/list"));
    text.context = example_text + text.context;
    return text;
  };
  return item;
}

constexpr int kNumAsked = 3;
constexpr int kMinCoded = 100;  // words, from which on the ranks asked for differ in frequency

RulerItem MakeFrequentWords(const RulerContext& context) {
  constexpr double kZeta2 = 1.6449340668482264;  // the sum over all ranks of rank^-2
  constexpr int kNumWords = 200;
  Random random(context.seed, context.id);
  std::set<std::string> used;
  std::vector<std::string> words = {"...."};  // the most frequent is not a word
  while (static_cast<int>(words.size()) < kNumWords) {
    std::string word;
    for (int i = 0; i < 6; ++i) word += static_cast<char>('a' + random.Below(26));
    if (used.insert(word).second) words.push_back(word);
  }
  RulerItem item;
  item.references.assign(words.begin() + 1, words.begin() + 1 + kNumAsked);
  item.text = [words, context](int size) -> PromptText {
    std::vector<std::string> text_words;
    for (size_t i = 0; i < words.size(); ++i) {
      const double rank = static_cast<double>(i + 1);
      const auto count = static_cast<size_t>((size + kMinCoded) / (rank * rank * kZeta2));
      text_words.insert(text_words.end(), std::max<size_t>(count, i <= kNumAsked ? 1 : 0),
                        words[i]);
    }
    Random(context.seed, context.id + "/order").Shuffle(text_words);
    return {
        .context =
            "The coded text below is made of made-up words and of dots, which mean "
            "nothing. Keep track of how often each word is in it.\n\n" +
            fmt::format("{}", fmt::join(text_words, " ")),
        .question = fmt::format("\n\nLeaving out the dots, what are the {} words that the coded "
                                "text has most often?",
                                kNumAsked),
        .answer_prefix = fmt::format("The {} most frequent coded words are:", kNumAsked)};
  };
  return item;
}

// ---- Questions on paragraphs --------------------------------------------------------------------

RulerItem MakeQuestion(const RulerContext& context) {
  Random order(context.seed, "ruler/qa");
  std::vector<int> questions(context.qa.questions.size());
  for (size_t i = 0; i < questions.size(); ++i) questions[i] = static_cast<int>(i);
  order.Shuffle(questions);
  const int chosen = questions[static_cast<size_t>(context.sample) % questions.size()];
  const QaQuestion& question = context.qa.questions[static_cast<size_t>(chosen)];

  Random random(context.seed, context.id);
  std::vector<int> others;
  for (int i = 0; i < static_cast<int>(context.qa.paragraphs.size()); ++i) {
    if (i != question.paragraph) others.push_back(i);
  }
  random.Shuffle(others);
  const double place = random.Unit();
  RulerItem item;
  item.references = question.answers;
  item.max_size = static_cast<int>(others.size());
  item.text = [others, place, &question, &qa = context.qa](int size) -> PromptText {
    std::vector<int> documents(others.begin(), others.begin() + size);
    documents.insert(documents.begin() + static_cast<int>(place * (size + 1)), question.paragraph);
    std::string text = "Answer a question from the documents below, in as few words as possible.";
    for (size_t i = 0; i < documents.size(); ++i) {
      text += fmt::format("\n\nDocument {}:\n{}", i + 1,
                          qa.paragraphs[static_cast<size_t>(documents[i])].text);
    }
    return {.context = std::move(text),
            .question = fmt::format("\n\nQuestion: {}", question.question),
            .answer_prefix = "Answer:"};
  };
  return item;
}

constexpr RulerKind kKinds[] = {
    {"niah_single_1", 128, MakeNeedlesOf<NeedleKind{.filler = Filler::kRepeated}>},
    {"niah_single_2", 128, MakeNeedlesOf<NeedleKind{}>},
    {"niah_single_3", 128, MakeNeedlesOf<NeedleKind{.uuid_values = true}>},
    {"niah_multikey_1", 128, MakeNeedlesOf<NeedleKind{.num_names = 4}>},
    {"niah_multikey_2", 128, MakeNeedlesOf<NeedleKind{.filler = Filler::kNeedles}>},
    {"niah_multikey_3", 128,
     MakeNeedlesOf<NeedleKind{
         .filler = Filler::kNeedles, .uuid_names = true, .uuid_values = true}>},
    {"niah_multivalue", 128, MakeNeedlesOf<NeedleKind{.num_values = 4}>},
    {"niah_multiquery", 128, MakeNeedlesOf<NeedleKind{.num_names = 4, .num_asked = 4}>},
    {"vt", 30, MakeVariableTracking},
    {"cwe", 120, MakeCommonWords},
    {"fwe", 50, MakeFrequentWords},
    {kQuestionKind, 32, MakeQuestion}};

}  // namespace

std::span<const RulerKind> AllRulerKinds() { return kKinds; }

}  // namespace gloam
