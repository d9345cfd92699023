#include "eval/prompt.h"

#include "catch2/catch.hpp"
#include "eval/random.h"
#include "tests/eval/word_tokenizer.h"

namespace gloam {
namespace {

std::string Repeat(std::string_view text, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += text;
  return out;
}

TEST_CASE("The question and the answer's beginning are what is decoded") {
  WordTokenizer tokenizer;
  const PromptText text = {
      .context = "one two three.", .question = "\nWhich?", .answer_prefix = "It is"};
  const auto plain = BuildPrompt(tokenizer, text, /*chat=*/false);
  REQUIRE(plain.ok());
  CHECK(tokenizer.Text(plain->tokens) == "<0>one two three.\nWhich?It is");
  const std::span<const int32_t> tokens(plain->tokens);
  CHECK(tokenizer.Text(tokens.last(static_cast<size_t>(plain->num_decoded))) == "\nWhich?It is");

  const auto chat = BuildPrompt(tokenizer, text, /*chat=*/true);
  REQUIRE(chat.ok());
  CHECK(tokenizer.Text(chat->tokens) == "<1>one two three.\nWhich?<2>It is");
  const std::span<const int32_t> chat_tokens(chat->tokens);
  CHECK(tokenizer.Text(chat_tokens.last(static_cast<size_t>(chat->num_decoded))) ==
        "\nWhich?<2>It is");
}

TEST_CASE("At least one token is decoded") {
  WordTokenizer tokenizer;
  const auto prompt = BuildPrompt(tokenizer, {.context = "only context"}, /*chat=*/false);
  REQUIRE(prompt.ok());
  CHECK(prompt->num_decoded == 1);
}

TEST_CASE("A fitted prompt is the longest that fits") {
  WordTokenizer tokenizer;
  const auto make = [](int size) -> PromptText {
    return {.context = Repeat("a b c. ", size), .question = "Which?"};
  };
  for (const int limit : {10, 100, 101, 107, 1000, 5003}) {
    const auto fitted = FitPrompt(tokenizer, /*chat=*/false, limit, 1 << 20, make);
    REQUIRE(fitted.ok());
    CHECK(fitted->prompt.num_tokens() <= limit);
    const auto longer = BuildPrompt(tokenizer, make(fitted->size + 1), /*chat=*/false);
    CHECK(longer->num_tokens() > limit);
  }
  CHECK(FitPrompt(tokenizer, false, 100000, 7, make)->size == 7);
  CHECK(FitPrompt(tokenizer, false, 2, 7, make).status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("Units of very different lengths still end at the longest prompt that fits") {
  WordTokenizer tokenizer;
  const auto make = [](int size) -> PromptText {
    std::string text;
    for (int i = 0; i < size; ++i) text += Repeat("x ", i % 37 == 0 ? 200 : 1) + ". ";
    return {.context = text, .question = "Which?"};
  };
  const auto fitted = FitPrompt(tokenizer, /*chat=*/false, 20000, 1 << 20, make);
  REQUIRE(fitted.ok());
  CHECK(fitted->prompt.num_tokens() <= 20000);
  CHECK(BuildPrompt(tokenizer, make(fitted->size + 1), false)->num_tokens() > 20000);
}

TEST_CASE("Random draws are the same everywhere") {
  Random random(7, "name");
  CHECK(random.Below(1000) == Random(7, "name").Below(1000));
  std::vector<int> order = {0, 1, 2, 3, 4, 5, 6, 7};
  random.Shuffle(order);
  std::vector<int> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  CHECK(sorted == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7});
  CHECK(HashText("") == 0xcbf29ce484222325u);
  CHECK(HashText("a") == 0xaf63dc4c8601ec8cu);  // FNV-1a's own test vector
}

}  // namespace
}  // namespace gloam
