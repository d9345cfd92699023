// The generators of tasks: what is asked for is really in the text, where it should be, at the
// length that was asked for, and the same at every run.
#include "eval/tasks/tasks.h"

#include <algorithm>
#include <set>
#include <sstream>

#include "catch2/catch.hpp"
#include "eval/words.h"
#include "tests/eval/word_tokenizer.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

struct ItemText {
  EvalItem item;
  std::string all, context, decoded;
};

ItemText MakeText(Task& task, WordTokenizer& tokenizer, int index) {
  auto item = task.MakeItem(index);
  INFO(item.status());
  REQUIRE(item.ok());
  ItemText text;
  const std::span<const int32_t> tokens(item->prompt.tokens);
  const auto num_decoded = static_cast<size_t>(item->prompt.num_decoded);
  text.all = tokenizer.Text(tokens);
  text.context = tokenizer.Text(tokens.first(tokens.size() - num_decoded));
  text.decoded = tokenizer.Text(tokens.last(num_decoded));
  text.item = *std::move(item);
  return text;
}

bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != text.npos;
}

int CountOf(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST_CASE("Passkey: the key is at its depth, in a text of the length") {
  WordTokenizer tokenizer;
  PasskeyOptions options;
  options.common = {.lengths = {512, 2000}, .num_samples = 2, .seed = 3};
  options.depths = {0, 0.5, 1};
  const auto task = MakePasskeyTask(options, tokenizer);
  REQUIRE(task->num_items() == 12);
  std::set<std::string> ids, keys;
  for (int i = 0; i < task->num_items(); ++i) {
    const ItemText text = MakeText(*task, tokenizer, i);
    CHECK(text.item.id == task->ItemId(i));
    ids.insert(text.item.id);
    const std::string& key = text.item.references.front();
    keys.insert(key);
    CHECK(CountOf(text.context, key) == 2);
    CHECK_FALSE(Contains(text.decoded, key));
    CHECK(Contains(text.decoded, "What is the pass key"));
    const int length = text.item.facts["length"];
    const int total = text.item.prompt.num_tokens() + text.item.max_tokens;
    CHECK(total <= length);
    CHECK(total > length - 20);  // a sentence of filler short of it at most
    const double depth = static_cast<double>(text.context.find("The pass key is " + key)) /
                         static_cast<double>(text.context.size());
    CHECK(depth == Approx(text.item.facts["depth"].get<double>()).margin(0.2));
    CHECK(task->Score(text.item, " " + key + ".\n123") == std::vector<double>{1});
    CHECK(task->Score(text.item, "12" + key) == std::vector<double>{0});
    CHECK(task->Score(text.item, "unknown") == std::vector<double>{0});
  }
  CHECK(ids.size() == 12);
  CHECK(keys.size() == 12);
}

TEST_CASE("Items are the same at every run, whichever are made") {
  WordTokenizer tokenizer;
  RulerOptions options;
  options.common = {.lengths = {1024}, .num_samples = 2, .seed = 5};
  auto first = MakeRulerTask(options, tokenizer);
  auto second = MakeRulerTask(options, tokenizer);
  options.common.seed = 6;
  auto other = MakeRulerTask(options, tokenizer);
  REQUIRE(first.ok());
  for (int i = (*first)->num_items() - 1; i >= 0; --i) {
    const auto a = (*first)->MakeItem(i);
    CHECK(a->prompt.tokens == (*second)->MakeItem(i)->prompt.tokens);
    CHECK(a->prompt.tokens != (*other)->MakeItem(i)->prompt.tokens);
  }
  CHECK((*first)->parameters() == (*second)->parameters());
  CHECK((*first)->parameters() != (*other)->parameters());
}

QaData SmallQa() {
  json paragraphs = json::array();
  for (int i = 0; i < 40; ++i) {
    paragraphs.push_back(
        {{"context", fmt::format("Paragraph {} says that thing{} is of colour{}.", i, i, i)},
         {"qas",
          {{{"question", fmt::format("Which colour is thing{}?", i)},
            {"answers", {{{"text", fmt::format("colour{}", i)}}}}},
           {{"question", "What is not said?"},
            {"answers", json::array()},
            {"is_impossible", true}}}}});
  }
  const auto data = ParseQaData(json{{"data", {{{"paragraphs", paragraphs}}}}}.dump());
  INFO(data.status());
  REQUIRE(data.ok());
  return *data;
}

TEST_CASE("RULER: every kind hides its references in the context and asks after it") {
  WordTokenizer tokenizer;
  RulerOptions options;
  options.common = {.lengths = {1024, 4096}, .num_samples = 3, .seed = 1};
  options.qa = SmallQa();
  auto task = MakeRulerTask(options, tokenizer);
  REQUIRE(task.ok());
  CHECK((*task)->num_items() == static_cast<int>(RulerKinds().size()) * 2 * 3);
  for (int i = 0; i < (*task)->num_items(); ++i) {
    const ItemText text = MakeText(**task, tokenizer, i);
    INFO(text.item.id << " " << text.decoded);
    const std::string kind = text.item.facts["kind"];
    REQUIRE_FALSE(text.item.references.empty());
    for (const std::string& reference : text.item.references) {
      CHECK(Contains(text.context, reference));
      CHECK_FALSE(Contains(text.decoded, reference));
    }
    const int length = text.item.facts["length"];
    const int total = text.item.prompt.num_tokens() + text.item.max_tokens;
    CHECK(total <= length);
    if (kind != "qa") CHECK(total > length - 50);  // one unit of filler short of it at most
    std::string all, half;
    for (size_t j = 0; j < text.item.references.size(); ++j) {
      all += text.item.references[j] + ", ";
      if (j % 2 == 0) half += text.item.references[j] + ", ";
    }
    CHECK((*task)->Score(text.item, all) == std::vector<double>{1});
    CHECK((*task)->Score(text.item, "no idea") == std::vector<double>{0});
    const double share = static_cast<double>((text.item.references.size() + 1) / 2) /
                         static_cast<double>(text.item.references.size());
    CHECK((*task)->Score(text.item, half)[0] == Approx(share));
  }
}

// The item of a kind at sample 0.
ItemText OneOfKind(WordTokenizer& tokenizer, const std::string& kind, int length = 2048) {
  RulerOptions options;
  options.common = {.lengths = {length}, .num_samples = 1, .seed = 11};
  options.kinds = {kind};
  options.qa = SmallQa();
  auto task = MakeRulerTask(options, tokenizer);
  REQUIRE(task.ok());
  return MakeText(**task, tokenizer, 0);
}

TEST_CASE("RULER: how many needles a kind has, and how many are asked for") {
  WordTokenizer tokenizer;
  CHECK(CountOf(OneOfKind(tokenizer, "niah_single_1").context, "The secret number of") == 1);
  CHECK(CountOf(OneOfKind(tokenizer, "niah_single_3").context, "The secret code of") == 1);
  const ItemText multikey = OneOfKind(tokenizer, "niah_multikey_1");
  CHECK(CountOf(multikey.context, "The secret number of") == 4);
  CHECK(multikey.item.references.size() == 1);
  CHECK(CountOf(OneOfKind(tokenizer, "niah_multikey_2").context, "The secret number of") > 50);
  CHECK(CountOf(OneOfKind(tokenizer, "niah_multikey_3").context, "The secret code of") > 15);
  CHECK(OneOfKind(tokenizer, "niah_multivalue").item.references.size() == 4);
  CHECK(OneOfKind(tokenizer, "niah_multiquery").item.references.size() == 4);
}

TEST_CASE("RULER: a chain of variables leads from each name to the value, in order") {
  WordTokenizer tokenizer;
  const ItemText text = OneOfKind(tokenizer, "vt");
  const auto& names = text.item.references;
  REQUIRE(names.size() == 5);
  size_t at = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string statement = i == 0 ? fmt::format("VAR {} = ", names[0])
                                         : fmt::format("VAR {} = VAR {}.", names[i], names[i - 1]);
    const size_t found = text.context.find(statement, at);
    REQUIRE(found != std::string::npos);
    at = found;
  }
}

TEST_CASE("RULER: the words that are asked for are the most frequent") {
  WordTokenizer tokenizer;
  for (const char* kind : {"cwe", "fwe"}) {
    const ItemText text = OneOfKind(tokenizer, kind, 4096);
    // The part after the example, word by word.
    std::istringstream words(text.context.substr(text.context.rfind("\n\n")));
    std::map<std::string, int> counts;
    for (std::string word; words >> word;) {
      if (word != "...." && word.find_first_of("0123456789") == word.npos) ++counts[word];
    }
    int least = 1 << 30, most_of_others = 0;
    for (const auto& [word, count] : counts) {
      const auto& references = text.item.references;
      if (std::find(references.begin(), references.end(), word) != references.end()) {
        least = std::min(least, count);
      } else {
        most_of_others = std::max(most_of_others, count);
      }
    }
    INFO(kind);
    CHECK(most_of_others > 0);
    CHECK(least > most_of_others);
  }
}

TEST_CASE("RULER: real text as a haystack, unknown kinds and missing data") {
  WordTokenizer tokenizer;
  RulerOptions options;
  options.common = {.lengths = {512}, .num_samples = 1, .seed = 1};
  options.common.haystack = SplitIntoSentences("It  was\nlate. Who came? Nobody came");
  REQUIRE(options.common.haystack ==
          std::vector<std::string>{"It was late.", "Who came?", "Nobody came"});
  options.kinds = {"niah_single_2"};
  auto task = MakeRulerTask(options, tokenizer);
  REQUIRE(task.ok());
  CHECK(CountOf(MakeText(**task, tokenizer, 0).context, "It was late. Who came?") > 5);

  options.kinds = {"niah_triple"};
  CHECK(MakeRulerTask(options, tokenizer).status().message().find("niah_triple") !=
        absl::string_view::npos);
  options.kinds = {"qa"};
  CHECK(MakeRulerTask(options, tokenizer).status().message().find("--qa-data") !=
        absl::string_view::npos);
  CHECK_FALSE(ParseQaData("{}").ok());
  CHECK_FALSE(ParseQaData("[").ok());
  CHECK_FALSE(ParseQaData(R"({"data": [{"paragraphs": [{"qas": []}]}]})").ok());
}

TEST_CASE("Names and words are distinct, however many are wanted") {
  Random random(1, "words");
  const auto words = DistinctWords(random, 9000);
  CHECK(std::set<std::string>(words.begin(), words.end()).size() == 9000);
}

struct LongBenchFolder {
  LongBenchFolder() {
    const auto& path = folder.path();
    std::filesystem::create_directories(path / "data");
    std::filesystem::create_directories(path / "config");
    test::WriteFile(path / "config/dataset2prompt.json",
                    R"({"qasper": "Read: {context}\n\nQ: {input}\nA:", "trec": "{context}\n{input}",
                        "samsum": "Sum up.\n{context}\n{input}", "vcsum": "{context}"})");
    test::WriteFile(path / "config/dataset2maxlen.json",
                    R"({"qasper": 32, "trec": 8, "samsum": 16, "vcsum": 9})");
    test::WriteFile(path / "data/qasper.jsonl",
                    Row("alpha beta gamma {input}", "which?", {"Beta", "gamma ray"}) + "\n" +
                        Row(Words(400), "what?", {"w7"}));
    test::WriteFile(path / "data/trec.jsonl", Row("Question: x", "Question: y", {"Person"}));
    test::WriteFile(path / "data/samsum.jsonl", Row("Dialogue: x", "Summary:", {"x"}));
  }
  static std::string Words(int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += fmt::format("{}w{}", i == 0 ? "" : " ", i);
    return text;
  }
  static std::string Row(const std::string& context, const std::string& input,
                         const std::vector<std::string>& answers) {
    return json{{"context", context}, {"input", input},   {"answers", answers},
                {"length", 3},        {"dataset", "any"}, {"all_classes", {"Person", "Place"}}}
               .dump() +
           "\n";
  }
  test::TempFolder folder;
};

TEST_CASE("LongBench: prompts from the published files, the question decoded") {
  WordTokenizer tokenizer;
  const LongBenchFolder files;
  LongBenchOptions options{.folder = files.folder.path(), .max_prompt_tokens = 100, .chat = true};
  auto task = MakeLongBenchTask(options, tokenizer);
  INFO(task.status());
  REQUIRE(task.ok());
  REQUIRE((*task)->num_items() == 4);
  CHECK((*task)->ItemId(1) == "qasper/1");

  const ItemText first = MakeText(**task, tokenizer, 0);
  CHECK(first.all == "<1>Read: alpha beta gamma {input}\n\nQ: which?\nA:<2>");
  CHECK(first.decoded == "\n\nQ: which?\nA:<2>");
  CHECK(first.item.max_tokens == 32);
  CHECK((*task)->Score(first.item, "the beta!") == std::vector<double>{1});

  // 400 words and spaces lose their middle: 50 tokens of either end are left.
  const ItemText cut = MakeText(**task, tokenizer, 1);
  CHECK(cut.item.prompt.num_tokens() <= 103);
  CHECK(Contains(cut.all, "Read: w0 w1 "));
  CHECK(Contains(cut.all, "w399\n\nQ: what?\nA:"));
  CHECK_FALSE(Contains(cut.all, "w200"));
  CHECK(cut.decoded == "\n\nQ: what?\nA:<2>");

  // Of the two that are published without a template one is trec; only its first line counts.
  const ItemText trec = MakeText(**task, tokenizer, 2);
  CHECK(trec.item.group == "trec");
  CHECK(trec.all == "<0>Question: x\nQuestion: y");
  CHECK((*task)->Score(trec.item, "\nPerson\nPlace") == std::vector<double>{1});
  CHECK((*task)->Score(trec.item, "Person or Place") == std::vector<double>{0.5});

  const ItemText samsum = MakeText(**task, tokenizer, 3);
  CHECK(samsum.item.stop_token_ids.size() == 1);
  CHECK(samsum.item.min_tokens == 1);
}

TEST_CASE("LongBench: what is wrong with the files is said") {
  WordTokenizer tokenizer;
  const LongBenchFolder files;
  const auto status = [&](std::vector<std::string> datasets) {
    return MakeLongBenchTask({.folder = files.folder.path(),
                              .datasets = std::move(datasets),
                              .max_prompt_tokens = 100},
                             tokenizer)
        .status();
  };
  CHECK(status({"vcsum"}).code() == StatusCode::kUnimplemented);
  CHECK(status({"nonsense"}).code() == StatusCode::kInvalidArgument);
  CHECK(status({"hotpotqa"}).code() == StatusCode::kNotFound);
  test::WriteFile(files.folder.path() / "data/musique.jsonl", "{}\n");
  CHECK(MessageOf(status({"musique"})).find("dataset2prompt.json") != std::string::npos);
  test::WriteFile(files.folder.path() / "data/trec.jsonl", "{\"context\": 1}\n");
  auto task = MakeLongBenchTask(
      {.folder = files.folder.path(), .datasets = {"trec"}, .max_prompt_tokens = 100}, tokenizer);
  REQUIRE(task.ok());
  CHECK((*task)->MakeItem(0).status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("Code: the wanted line follows the prompt in its file") {
  WordTokenizer tokenizer;
  const test::TempFolder folder;
  for (int file = 0; file < 6; ++file) {
    std::string text;
    for (int line = 0; line < 80; ++line) {
      text += fmt::format("    value_{}_{} = compute({})\n", file, line, line);
    }
    test::WriteFile(folder.path() / fmt::format("file{}.py", file), text);
  }
  test::WriteFile(folder.path() / "notes.txt", "not source\n");
  CodeOptions options{.common = {.lengths = {600, 2000}, .num_samples = 3, .seed = 2},
                      .folder = folder.path()};
  auto task = MakeCodeTask(options, tokenizer);
  REQUIRE(task.ok());
  for (int i = 0; i < (*task)->num_items(); ++i) {
    const ItemText text = MakeText(**task, tokenizer, i);
    const std::string& wanted = text.item.references.front();
    int file = 0, line = 0;
    REQUIRE(std::sscanf(wanted.c_str(), "value_%d_%d", &file, &line) == 2);
    CHECK(text.item.facts["file"] == fmt::format("file{}.py", file));
    CHECK(text.item.facts["line"] == line + 1);
    CHECK_FALSE(Contains(text.all, wanted));
    CHECK(
        text.decoded.ends_with(fmt::format("value_{}_{} = compute({})", file, line - 1, line - 1)));
    CHECK(CountOf(text.decoded, "\n") >= 7);
    CHECK_FALSE(Contains(text.all, "not source"));
    CHECK(text.item.prompt.num_tokens() + text.item.max_tokens <= text.item.facts["length"]);
    CHECK(text.item.prompt.num_tokens() + text.item.max_tokens >
          text.item.facts["length"].get<int>() - 30);
    CHECK((*task)->Score(text.item, "\n    " + wanted + "\nmore") == std::vector<double>{1, 1});
    CHECK((*task)->Score(text.item, "\n" + wanted + "x")[1] == 0);
  }
  CHECK_FALSE(MakeCodeTask({.folder = folder.path() / "none"}, tokenizer).ok());
}

}  // namespace
}  // namespace gloam
