// tokenizer.json and tokenizer.model against `tokenizers` and `sentencepiece`, over small
// vocabularies with the configurations of known families.
#include <unistd.h>
#include <filesystem>
#include <fstream>

#include "catch2/catch.hpp"
#include "models/tokenizer/tokenizer_factory.h"
#include "tests/models/tokenizer/goldens.h"

namespace gloam {
namespace {

using nlohmann::json;

// A folder that is gone at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder()
      : path_(std::filesystem::temp_directory_path() / fmt::format("gloam_hf_{}", getpid())) {
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  void Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::unique_ptr<Tokenizer> Load(const TemporaryFolder& folder) {
  auto tokenizer = LoadTokenizerFolder(folder.path(), {});
  INFO(tokenizer.status());
  REQUIRE(tokenizer.ok());
  return *std::move(tokenizer);
}

std::vector<std::string> PickLines(const json& golden) {
  const json all = ReadGolden("tokenizer_lines.json");
  std::vector<std::string> lines;
  for (const json& index : golden["lines"]) lines.push_back(all[index.get<size_t>()]);
  return lines;
}

json ComposeTokenizerJson(const json& golden, const json& variant) {
  json document = variant["tokenizer_json"];
  document["model"]["vocab"] = golden["vocab"];
  document["model"]["merges"] = golden["merges"];
  return document;
}

TEST_CASE("tokenizer.json of known families: every line gives the ids of `tokenizers`") {
  const std::string file = GENERATE("tokenizer_byte_level.json", "tokenizer_characters.json");
  const json golden = ReadGolden(file);
  const std::vector<std::string> few = PickLines(golden);
  for (const auto& [name, variant] : golden["variants"].items()) {
    INFO(name);
    const TemporaryFolder folder;
    folder.Write("tokenizer.json", ComposeTokenizerJson(golden, variant).dump());
    const auto tokenizer = Load(folder);
    std::vector<std::string> lines = few;
    if (name == "added") {
      for (const json& line : golden["added_lines"]) lines.push_back(line);
    }
    CheckGoldenIds(*tokenizer, lines, variant);
    CHECK(EncodeText(*tokenizer, "x", false, /*add_special=*/true) ==
          variant["with_special"].get<std::vector<int32_t>>());
  }
}

TEST_CASE("GGUF's named pre-tokenizers are those of the families") {
  const json golden = ReadGolden("tokenizer_byte_level.json");
  const std::vector<std::string> lines = PickLines(golden);
  const std::pair<const char*, const char*> pairs[] = {
      {"gpt-2", "gpt2"}, {"smollm", "smollm"}, {"llama-bpe", "llama3"}, {"tekken", "tekken"}};
  for (const auto& [pre, variant] : pairs) {
    INFO(pre);
    GgufVocabulary vocabulary{.model = "gpt2", .pre = pre};
    vocabulary.tokens.resize(golden["vocab"].size());
    for (const auto& [name, id] : golden["vocab"].items()) vocabulary.tokens[id] = name;
    vocabulary.types.assign(vocabulary.tokens.size(), 1);
    vocabulary.types[golden["vocab"]["<s>"]] = 3;
    vocabulary.types[golden["vocab"]["</s>"]] = 3;
    for (const json& merge : golden["merges"]) {
      vocabulary.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    }
    auto tokenizer = MakeTokenizer(std::move(vocabulary));
    INFO(tokenizer.status());
    REQUIRE(tokenizer.ok());
    CheckGoldenIds(**tokenizer, lines, golden["variants"][variant]);
  }
}

TEST_CASE("tokenizer.model: every line gives the ids and the text of SentencePiece") {
  const std::string name = GENERATE("sentencepiece_bpe", "sentencepiece_unigram");
  const json golden = ReadGolden("tokenizer_" + name + ".json");
  const std::vector<std::string> lines = PickLines(golden);
  const TemporaryFolder folder;
  folder.Write("tokenizer.model", ReadGoldenBytes(name + ".model"));
  const auto tokenizer = Load(folder);
  for (size_t i = 0; i < lines.size(); ++i) {
    CAPTURE(name, lines[i]);
    const std::vector<int32_t> ids = ParseIds(golden["plain"][i]);
    CHECK(EncodeText(*tokenizer, lines[i], false) == ids);
    CHECK(tokenizer->Decode(ids, true) == golden["decoded"][i].get<std::string>());
  }
}

TEST_CASE("a GGUF vocabulary of SentencePiece gives the same ids as its tokenizer.model") {
  const json golden = ReadGolden("tokenizer_sentencepiece_bpe.json");
  const std::vector<std::string> lines = PickLines(golden);
  GgufVocabulary vocabulary{.model = "llama"};
  vocabulary.tokens = golden["pieces"].get<std::vector<std::string>>();
  vocabulary.scores = golden["scores"].get<std::vector<float>>();
  for (const std::string& piece : vocabulary.tokens) {
    const bool is_byte = piece.size() == 6 && piece.starts_with("<0x");
    const bool is_control = piece == "<s>" || piece == "</s>";
    vocabulary.types.push_back(piece == "<unk>" ? 2 : is_control ? 3 : is_byte ? 6 : 1);
  }
  vocabulary.bos_id = 1;
  vocabulary.eos_id = 2;
  vocabulary.add_bos = true;
  auto made = MakeTokenizer(vocabulary);
  INFO(made.status());
  REQUIRE(made.ok());
  const Tokenizer& tokenizer = **made;
  for (size_t i = 0; i < lines.size(); ++i) {
    CAPTURE(lines[i]);
    std::vector<int32_t> ids = ParseIds(golden["plain"][i]);
    CHECK(EncodeText(tokenizer, lines[i], false) == ids);
    ids.insert(ids.begin(), 1);
    CHECK(EncodeText(tokenizer, lines[i], false, /*add_special=*/true) == ids);
  }
  SECTION("each piece of text between special tokens starts afresh") {
    std::vector<int32_t> expected = EncodeText(tokenizer, "the", false);
    const std::vector<int32_t> dog = EncodeText(tokenizer, "dog", false);
    expected.push_back(2);
    expected.insert(expected.end(), dog.begin(), dog.end());
    CHECK(EncodeText(tokenizer, "the</s>dog", true) == expected);
  }
  SECTION("without the space prefix") {
    vocabulary.add_space_prefix = false;
    auto bare = MakeTokenizer(vocabulary);
    REQUIRE(bare.ok());
    CHECK(EncodeText(**bare, " the", false) == EncodeText(tokenizer, "the", false));
    CHECK_FALSE((*bare)->strips_leading_space());
  }
}

TEST_CASE("tokenizer_config.json: BOS, EOS, legacy, added tokens") {
  const TemporaryFolder folder;
  folder.Write("tokenizer.model", ReadGoldenBytes("sentencepiece_bpe.model"));
  const auto plain = Load(folder);
  const int size = plain->vocab_size();
  const json config = {{"bos_token", "<s>"},
                       {"eos_token", {{"content", "<|im_end|>"}}},
                       {"add_bos_token", false},
                       {"add_eos_token", true},
                       {"legacy", false},
                       {"added_tokens_decoder",
                        {{std::to_string(size), {{"content", "<|im_end|>"}, {"special", true}}}}}};
  folder.Write("tokenizer_config.json", config.dump());
  const auto tokenizer = Load(folder);
  CHECK(tokenizer->vocab_size() == size + 1);
  CHECK(tokenizer->bos_id() == 1);
  CHECK(tokenizer->IsSpecial(size));
  // SentencePiece's own </s> and the file's <|im_end|>.
  CHECK(std::vector<int32_t>(tokenizer->eos_ids().begin(), tokenizer->eos_ids().end()) ==
        std::vector<int32_t>{2, size});
  std::vector<int32_t> expected = EncodeText(*plain, "the", false);
  expected.push_back(size);
  CHECK(EncodeText(*tokenizer, "the", false, /*add_special=*/true) == expected);
  // legacy: false puts the space in front of the prompt alone.
  const std::vector<int32_t> after = EncodeText(*tokenizer, "<|im_end|> the", true);
  expected = {size};
  for (const int32_t id : EncodeText(*plain, "the", false)) expected.push_back(id);
  CHECK(after == expected);
}

TEST_CASE("what a folder asks for and we lack is named") {
  const json golden = ReadGolden("tokenizer_byte_level.json");
  const json base = ComposeTokenizerJson(golden, golden["variants"]["gpt2"]);
  const auto error_of = [](const json& document) {
    const TemporaryFolder folder;
    folder.Write("tokenizer.json", document.dump());
    const auto tokenizer = LoadTokenizerFolder(folder.path(), {});
    REQUIRE_FALSE(tokenizer.ok());
    return tokenizer.status();
  };
  const auto check = [&](json document, StatusCode code, const std::string& part) {
    const Status status = error_of(document);
    INFO(status);
    CHECK(status.code() == code);
    CHECK_THAT(MessageOf(status), Catch::Contains(part));
  };
  json document = base;
  document["model"]["type"] = "Unigram";
  check(document, StatusCode::kUnimplemented, "model: the type 'Unigram'");
  document = base;
  document["normalizer"] = {{"type", "Lowercase"}};
  check(document, StatusCode::kUnimplemented, "normalizer: the normalizer 'Lowercase'");
  document = base;
  document["pre_tokenizer"] = {{"type", "Sequence"},
                               {"pretokenizers", {{{"type", "Punctuation"}}}}};
  check(document, StatusCode::kUnimplemented, "pre_tokenizer.pretokenizers[0]: the pre-tokenizer");
  document["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", "[a&&b]"}}}, {"behavior", "Isolated"}};
  check(document, StatusCode::kUnimplemented, "pre_tokenizer.pattern");
  document["pre_tokenizer"]["pattern"]["Regex"] = "(";
  check(document, StatusCode::kInvalidArgument, "pre_tokenizer.pattern");
  document = base;
  document["decoder"] = {{"type", "WordPiece"}};
  check(document, StatusCode::kUnimplemented, "decoder: the decoder 'WordPiece'");
  document = base;
  document["post_processor"] = {{"type", "BertProcessing"}};
  check(document, StatusCode::kUnimplemented, "post_processor: the post-processor");
  document = base;
  document["model"]["merges"].push_back({"no such", "token"});
  check(document, StatusCode::kInvalidArgument, "model.merges");
  document = base;
  document["model"]["vocab"]["far"] = 100000000;
  check(document, StatusCode::kInvalidArgument, "model.vocab has the id 100000000");
  document = base;
  document["model"].erase("merges");
  check(document, StatusCode::kInvalidArgument, "model.merges must be an array");
  const TemporaryFolder empty;
  CHECK(LoadTokenizerFolder(empty.path(), {}).status().code() == StatusCode::kNotFound);
}

}  // namespace
}  // namespace gloam
