// Byte-level BPE over a vocabulary made here: parts, special tokens, odd bytes, errors.
#include <random>

#include "catch2/catch.hpp"
#include "models/tokenizer/token_table.h"
#include "models/tokenizer/tokenizer_factory.h"
#include "models/tokenizer/unicode.h"
#include "tests/models/tokenizer/goldens.h"

namespace gloam {
namespace {

constexpr int kAb = 256, kAbc = 257, kEnd = 258, kTool = 259, kEndLonger = 260;

GgufVocabulary MakeVocabulary() {
  GgufVocabulary v{.model = "gpt2", .pre = "gpt-2"};
  for (int byte = 0; byte < 256; ++byte) v.tokens.push_back(ByteCharOf(static_cast<uint8_t>(byte)));
  v.tokens.insert(v.tokens.end(), {"ab", "abc", "<end>", "<tool>", "<end>!!"});
  v.types.assign(v.tokens.size(), 1);
  v.types[kEnd] = v.types[kEndLonger] = 3;
  v.types[kTool] = 4;
  v.merges = {"a b", "ab c"};
  v.eos_id = kEnd;
  return v;
}

std::unique_ptr<Tokenizer> Make(GgufVocabulary v = MakeVocabulary()) {
  auto tokenizer = MakeTokenizer(std::move(v));
  INFO(tokenizer.status());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

using Ids = std::vector<int32_t>;

Ids EncodeParts(const Tokenizer& tokenizer, const std::vector<TextPart>& parts) {
  auto ids = tokenizer.Encode(parts, false);
  REQUIRE(ids.ok());
  return *std::move(ids);
}

TEST_CASE("parts are one text; special tokens must lie inside parts that allow them") {
  const auto t = Make();
  CHECK(EncodeParts(*t, {{"a", false}, {"b", true}, {"c", false}}) == Ids{kAbc});
  CHECK(EncodeParts(*t, {{"<end>", true}}) == Ids{kEnd});
  CHECK(EncodeParts(*t, {{"<e", true}, {"nd>", true}}) == Ids{kEnd});
  const Ids plain = EncodeParts(*t, {{"<end>", false}});
  CHECK(plain.size() == 5);
  CHECK(EncodeParts(*t, {{"<e", true}, {"nd>", false}}) == plain);
  CHECK(EncodeParts(*t, {{"<e", false}, {"nd>", true}}) == plain);
  CHECK(EncodeParts(*t, {{"", true}, {"<end>", false}, {"", true}}) == plain);
  // The longer token reaches into the client's part, the shorter one does not.
  CHECK(EncodeParts(*t, {{"<end>", true}, {"!!", false}}) == Ids{kEnd, '!', '!'});
  CHECK(EncodeParts(*t, {{"<end>!!", true}}) == Ids{kEndLonger});
  CHECK(EncodeParts(*t, {{"<to", false}, {"ol>", true}}) == Ids{kTool});
  CHECK(EncodeParts(*t, {{"a", false}, {"<end>", true}, {"b", false}}).size() == 3);
  CHECK(EncodeParts(*t, {}).empty());
}

TEST_CASE("random parts: no special token comes out of a client's text") {
  const auto t = Make();
  const unsigned seed = GENERATE(range(0u, 10u));
  CAPTURE(seed);
  std::mt19937 rng(seed);
  const std::string_view pieces[] = {"<", "<end", ">", "<end>", "!", "!!", "e", "nd>", "ab", ""};
  for (int round = 0; round < 300; ++round) {
    std::vector<TextPart> parts;
    std::string text;
    for (unsigned i = rng() % 7; i > 0; --i) {
      parts.push_back({pieces[rng() % std::size(pieces)], rng() % 2 == 0});
      text += parts.back().text;
    }
    const Ids ids = EncodeParts(*t, parts);
    CHECK(t->Decode(ids, false) == text);
    // Each special token must be found whole in allowed text.
    std::string allowed;
    for (const TextPart& part : parts) {
      allowed += part.allow_special ? std::string(part.text) : std::string(part.text.size(), '\0');
    }
    size_t from = 0;
    for (const int32_t id : ids) {
      if (!t->IsSpecial(id)) continue;
      from = allowed.find(t->TokenBytes(id, false), from);
      REQUIRE(from != std::string::npos);
      from += t->TokenBytes(id, false).size();
    }
  }
}

TEST_CASE("any bytes are taken: ill-formed ones as U+FFFD") {
  const auto t = Make();
  CHECK(t->Decode(EncodeText(*t, "a\xFF\xE2\x82", false), true) == "a\uFFFD\uFFFD");
  CHECK(t->Decode(EncodeText(*t, std::string("\0a\0", 3), false), true) == std::string("\0a\0", 3));
  CHECK(EncodeText(*t, "", false).empty());
}

TEST_CASE("long runs of one class stay one word and are merged in order") {
  const auto t = Make();
  constexpr size_t kSize = 1 << 20;
  std::string text;
  while (text.size() < kSize) text += "ab";
  const Ids ids = EncodeText(*t, text, false);
  CHECK(ids == Ids(kSize / 2, kAb));
  CHECK(EncodeText(*t, std::string(kSize, ' '), false).size() == kSize);
  CHECK(EncodeText(*t, std::string(kSize, '\n') + "x", false).size() == kSize + 1);
}

TEST_CASE("form C: composition, order of marks, long runs of marks") {
  CHECK(NormalizeNfc("e\u0301") == "\u00E9");
  CHECK(NormalizeNfc("q\u0307\u0323") == "q\u0323\u0307");
  CHECK(NormalizeNfc("\u1100\u1161\u11A8") == "\uAC01");
  CHECK(NormalizeNfc("\u212B") == "\u00C5");
  CHECK(NormalizeNfc("plain \u00E9") == "plain \u00E9");
  // A mark of Unicode 12: a letter to the reference, so nothing moves past it.
  CHECK(NormalizeNfc("\u0EC9\u0EBA") == "\u0EC9\u0EBA");
  std::string marks = "a", ordered = "\u1EA1";  // the first dot below joins the a
  for (int i = 0; i < 50000; ++i) marks += "\u0307\u0323";
  for (int i = 1; i < 50000; ++i) ordered += "\u0323";
  for (int i = 0; i < 50000; ++i) ordered += "\u0307";
  CHECK(NormalizeNfc(marks) == ordered);
}

TEST_CASE("a bad vocabulary is refused, its key named") {
  const auto check = [](GgufVocabulary v, StatusCode code, const std::string& part) {
    const auto tokenizer = MakeTokenizer(std::move(v));
    REQUIRE_FALSE(tokenizer.ok());
    CHECK(tokenizer.status().code() == code);
    CHECK_THAT(MessageOf(tokenizer.status()), Catch::Contains(part));
  };
  GgufVocabulary v = MakeVocabulary();
  v.model = "bert";
  check(v, StatusCode::kUnimplemented, "tokenizer.ggml.model: 'bert'");
  v = MakeVocabulary();
  v.pre = "new-thing";
  check(v, StatusCode::kUnimplemented, "tokenizer.ggml.pre: 'new-thing'");
  v = MakeVocabulary();
  v.merges.push_back("x yz");
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.merges: merge 2");
  v = MakeVocabulary();
  v.merges.push_back("nospace");
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.merges[2]");
  v = MakeVocabulary();
  v.types.pop_back();
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.token_type");
  v = MakeVocabulary();
  v.types[5] = 9;
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.token_type[5]");
  v = MakeVocabulary();
  v.eos_id = 1000;
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.eos_token_id: 1000");
  v = MakeVocabulary();
  v.add_bos = true;
  check(v, StatusCode::kInvalidArgument, "add_bos_token");
  v = MakeVocabulary();
  v.tokens.clear();
  v.types.clear();
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.tokens");
  v = MakeVocabulary();
  v.model = "llama";
  check(v, StatusCode::kInvalidArgument, "tokenizer.ggml.scores");
}

}  // namespace
}  // namespace gloam
