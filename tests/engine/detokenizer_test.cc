#include "engine/detokenizer.h"

#include <fstream>
#include <random>

#include "catch2/catch.hpp"
#include "models/tokenizer/tokenizer_factory.h"
#include "models/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace gloam {
namespace {

constexpr int kEnd = 256;  // a control token, <end>

// One token a byte (ids 0-255), so every split of every character occurs; SentencePiece's shape.
std::unique_ptr<Tokenizer> MakeByteTokenizer(bool add_space_prefix) {
  GgufVocabulary v{.model = "llama"};
  for (int byte = 0; byte < 256; ++byte) {
    v.tokens.push_back(fmt::format("<0x{:02X}>", byte));
    v.types.push_back(6);
  }
  v.tokens.insert(v.tokens.end(), {"<end>", "<unk>", "\xE2\x96\x81"});
  v.types.insert(v.types.end(), {3, 2, 1});
  v.scores.assign(v.tokens.size(), 0);
  v.add_space_prefix = add_space_prefix;
  auto tokenizer = MakeTokenizer(std::move(v));
  INFO(tokenizer.status());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

std::vector<int32_t> BytesOf(std::string_view text) {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
  return ids;
}

// Streams, checking that every piece is whole characters.
std::string Stream(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
  StreamingDetokenizer detokenizer(tokenizer, skip_special);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.Append(id);
    CHECK(IsValidUtf8(piece));
    text += piece;
  }
  return text + detokenizer.Flush();
}

TEST_CASE("every golden line, a byte at a time, comes back whole") {
  const auto tokenizer = MakeByteTokenizer(false);
  std::ifstream file("tests/goldens/tokenizer_lines.json");
  REQUIRE(file.good());
  const auto lines = nlohmann::json::parse(file).get<std::vector<std::string>>();
  REQUIRE(lines.size() > 3000);
  for (const std::string& line : lines) {
    REQUIRE(Stream(*tokenizer, BytesOf(line), true) == line);
  }
}

TEST_CASE("text goes out as soon as its character is whole") {
  const auto tokenizer = MakeByteTokenizer(false);
  StreamingDetokenizer detokenizer(*tokenizer, true);
  CHECK(detokenizer.Append('a') == "a");
  CHECK(detokenizer.Append(0xE2) == "");
  CHECK(detokenizer.Append(0x82) == "");
  CHECK(detokenizer.Append(0xAC) == "\u20AC");
  CHECK(detokenizer.Append(0xF0) == "");
  CHECK(detokenizer.Append('b') == "\uFFFDb");
  CHECK(detokenizer.Append(0xFF) == "\uFFFD");
  CHECK(detokenizer.Append(0xF0) == "");
  CHECK(detokenizer.Flush() == "\uFFFD");
  CHECK(detokenizer.Flush() == "");
}

TEST_CASE("ill-formed bytes become what Python's errors=\"replace\" makes of them") {
  const auto tokenizer = MakeByteTokenizer(false);
  // Each pair as CPython 3.11 prints it.
  const std::pair<std::string, std::string> cases[] = {
      {"\x80", "\uFFFD"},
      {"\xC0\x80", "\uFFFD\uFFFD"},
      {"\xE2\x82", "\uFFFD"},
      {"\xE2\x28\xA1", "\uFFFD(\uFFFD"},
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xF0\x9F\x98\x61", "\uFFFD\x61"},
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
      {"\xF0\x80\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xE1\x80\xE1\x80\x80", "\uFFFD\u1000"},
      {"a\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64",
       "a\uFFFD\uFFFD\uFFFD\x62\uFFFD\x63\uFFFD\uFFFD\x64"},
  };
  for (const auto& [bytes, expected] : cases) {
    CAPTURE(nlohmann::json(BytesOf(bytes)).dump());
    CHECK(Stream(*tokenizer, BytesOf(bytes), true) == expected);
    CHECK(ReplaceInvalidUtf8(bytes) == expected);
  }
}

TEST_CASE("random bytes: the stream equals the whole, with replacement") {
  const auto seed = GENERATE(range(0u, 20u));
  CAPTURE(seed);
  std::mt19937 rng(seed);
  const auto tokenizer = MakeByteTokenizer(seed % 2 == 0);
  const uint8_t alphabet[] = {'a', ' ', 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0, 0xE2, 0xED, 0xF0, 0xF4};
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> ids;
    const int size = static_cast<int>(rng() % 12);
    for (int i = 0; i < size; ++i) ids.push_back(alphabet[rng() % std::size(alphabet)]);
    const bool skip_special = rng() % 2 == 0;
    if (rng() % 3 == 0) ids.insert(ids.begin() + static_cast<int>(rng() % (ids.size() + 1)), kEnd);
    CHECK(Stream(*tokenizer, ids, skip_special) ==
          ReplaceInvalidUtf8(tokenizer->Decode(ids, skip_special)));
  }
}

TEST_CASE("SentencePiece's leading space goes once, and special tokens as asked") {
  const auto tokenizer = MakeByteTokenizer(true);
  const int space = 258;
  CHECK(Stream(*tokenizer, {space, 'a', space, 'b'}, true) == "a b");
  CHECK(Stream(*tokenizer, {space, space, 'a'}, true) == " a");
  CHECK(Stream(*tokenizer, {kEnd, space, 'a'}, true) == "a");
  CHECK(Stream(*tokenizer, {kEnd, space, 'a'}, false) == "<end> a");
  CHECK(Stream(*MakeByteTokenizer(false), {space, 'a'}, true) == " a");
}

}  // namespace
}  // namespace gloam
