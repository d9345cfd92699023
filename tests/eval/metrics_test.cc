#include "eval/metrics.h"

#include "catch2/catch.hpp"

namespace gloam {
namespace {

using Strings = std::vector<std::string>;

TEST_CASE("String match counts the references that the answer contains") {
  CHECK(ContainedShare("It is Quiet-River, then 4711.", Strings{"quiet-river", "4711"}) == 1.0);
  CHECK(ContainedShare("4711 and 12", Strings{"4711", "4712", "12", "13"}) == 0.5);
  CHECK(ContainedShare("", Strings{"x"}) == 0.0);
  CHECK(ContainedShare("x", Strings{}) == 0.0);
  CHECK(ContainsAny("in Paris.", Strings{"London", "paris"}) == 1.0);
  CHECK(ContainsAny("in Rome", Strings{"London", "paris"}) == 0.0);
}

TEST_CASE("F1 normalises as SQuAD does") {
  CHECK(NormalizedWords("The cat's  (an) old-toy, A b.") == Strings{"cats", "oldtoy", "b"});
  CHECK(TokenF1("the Eiffel Tower!", "Eiffel tower") == 1.0);
  // Two of three words, two of four: 2 * (2/3) * (1/2) / (2/3 + 1/2).
  CHECK(TokenF1("red green blue", "red green black white") == Approx(4.0 / 7));
  // "go go" against "go": one common word, of two and of one.
  CHECK(TokenF1("go go", "go") == Approx(2.0 / 3));
  CHECK(TokenF1("", "x") == 0.0);
  CHECK(TokenF1("the", "a") == 0.0);
}

// Values of rouge 1.0.1: Rouge().get_scores([answer], [reference], avg=True)["rouge-l"]["f"].
TEST_CASE("ROUGE-L agrees with the package that LongBench uses") {
  const auto near = [](double value) { return Approx(value).margin(1e-9); };
  CHECK(RougeL("the cat sat on the mat", "the cat is on the mat") == near(0.7999999950));
  CHECK(RougeL("police killed the gunman. the gunman was armed",
               "police kill the gunman. he was armed") == near(0.7692307643));
  CHECK(RougeL("a b c d", "d c b a") == near(0.2499999950));
  CHECK(RougeL("The report covers waste. It was long. Rates fell.",
               "The report was long and covers waste. Rates fell in May.") == near(0.7999999950));
  CHECK(RougeL("one. two. three", "three. two. one") == near(0.9999999950));
  CHECK(RougeL("same same same word", "same word word") == near(0.9999999950));
  CHECK(RougeL("ends with dot. ", "ends with dot.") == near(0.8571428522));
  CHECK(RougeL("a c b a d. b a c", "c a b. d b c a") == near(0.7499999950));
  CHECK(RougeL("nothing alike", "totally different text") == 0.0);
  CHECK(RougeL("", "x") == 0.0);
  CHECK(RougeL("...", "x") == 0.0);
}

// Values of fuzzywuzzy 0.18.0 on difflib: fuzz.ratio(answer, reference).
TEST_CASE("Edit similarity agrees with the package that LongBench uses") {
  CHECK(EditSimilarity("return x + 1", "return x + 2") == 0.92);
  CHECK(EditSimilarity("self.value = value", "self._value = val") == 0.91);
  CHECK(EditSimilarity("def f(a, b):", "def g(b, a):") == 0.75);
  CHECK(EditSimilarity("na\u00efve caf\u00e9", "naive cafe") == 0.80);
  CHECK(EditSimilarity("for i in range(10):", "while i < 10:") == 0.44);
  CHECK(EditSimilarity("abcdefgh", "hgfedcba") == 0.12);
  CHECK(EditSimilarity("abc", "abc") == 1.0);
  CHECK(EditSimilarity("", "abc") == 0.0);
  CHECK(EditSimilarity("", "") == 1.0);

  // Long texts, where frequent characters start no run.
  std::string imports, others;
  for (int i = 0; i < 30; ++i) imports += "import os\n";
  for (int i = 0; i < 30; ++i) others += "import sys\n";
  CHECK(EditSimilarity(imports, others) == 0.02);
  CHECK(EditSimilarity(std::string(205, 'x') + "yz", std::string(210, 'x')) == 0.98);
}

TEST_CASE("Code similarity takes the first line that is code") {
  CHECK(CodeSimilarity("\n\n# say so\n```python\nreturn x\nmore", "return x") == 1.0);
  CHECK(CodeSimilarity("// only comments\n# here", "return x") == 0.0);
  CHECK(CodeSimilarity("return x + 1\n", "return x + 2") == 0.92);
}

TEST_CASE("Retrieval and counting look at the numbers of an answer") {
  CHECK(RetrievalScore("Paragraph 12", "Paragraph 12", "Paragraph ") == 1.0);
  CHECK(RetrievalScore("12 or 13", "Paragraph 12", "Paragraph ") == 0.5);
  CHECK(RetrievalScore("the twelfth", "Paragraph 12", "Paragraph ") == 0.0);
  CHECK(RetrievalScore("112", "Paragraph 12", "Paragraph ") == 0.0);
  CHECK(RetrievalScore("\u6bb5\u843d7", "\u6bb5\u843d7", "\u6bb5\u843d") == 1.0);
  CHECK(CountScore("There are 7 of them, 7 of 9", "7") == Approx(2.0 / 3));
  CHECK(CountScore("none", "0") == 0.0);
}

TEST_CASE("Classification divides by the classes that an answer names") {
  const Strings classes = {"Number", "Number of days", "Person", "Place"};
  CHECK(ClassificationScore("Person", "Person", classes) == 1.0);
  CHECK(ClassificationScore("Person, or a Place", "Person", classes) == 0.5);
  CHECK(ClassificationScore("Number of days", "Number of days", classes) == 1.0);
  CHECK(ClassificationScore("Number of days", "Number", classes) == 0.5);
  CHECK(ClassificationScore("Place", "Person", classes) == 0.0);
}

TEST_CASE("The first line is the first with something on it") {
  CHECK(FirstLine("\n  \n   return x  \n y") == "return x");
  CHECK(FirstLine(" \n\t") == "");
  CHECK(Trim("  a b\n") == "a b");
}

}  // namespace
}  // namespace gloam
