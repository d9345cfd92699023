// The catalogue models' tokenizers against Hugging Face's, on every golden line.
#include "catch2/catch.hpp"
#include "models/model_file.h"
#include "tests/models/catalogue_model.h"
#include "tests/models/tokenizer/goldens.h"

namespace gloam {
namespace {

struct Loaded {
  std::unique_ptr<ModelFile> file;
  std::unique_ptr<Tokenizer> tokenizer;  // null: the model is not on this machine
};

Loaded Load(const std::string& name) {
  const auto path = CatalogueModelPath(name);
  if (!std::filesystem::exists(path)) {
    WARN("skipped: " << path << " is missing (gloam pull " << name << ")");
    return {};
  }
  auto file = ModelFile::Open(path);
  INFO(file.status());
  REQUIRE(file.ok());
  auto tokenizer = (*file)->LoadTokenizer();
  INFO(tokenizer.status());
  REQUIRE(tokenizer.ok());
  return {*std::move(file), *std::move(tokenizer)};
}

TEST_CASE("every golden line gives Hugging Face's ids and comes back as text") {
  const std::string name = GENERATE("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct");
  const Loaded loaded = Load(name);
  if (loaded.tokenizer == nullptr) return;
  const auto lines = ReadGolden("tokenizer_lines.json").get<std::vector<std::string>>();
  const nlohmann::json golden = ReadGolden("tokenizer_" + name + ".json");
  CAPTURE(name, lines.size());
  CheckGoldenIds(*loaded.tokenizer, lines, golden);
}

TEST_CASE("SmolLM2: special tokens, ends of an answer, prefix") {
  const Loaded loaded = Load("smollm2-135m-instruct");
  if (loaded.tokenizer == nullptr) return;
  const Tokenizer& t = *loaded.tokenizer;
  CHECK(t.vocab_size() == 49152);
  CHECK(t.FindToken("<|im_end|>") == 2);
  CHECK(t.FindToken("no such token") == std::nullopt);
  CHECK(std::vector<int32_t>(t.eos_ids().begin(), t.eos_ids().end()) == std::vector<int32_t>{0, 2});
  CHECK(t.bos_id() == 1);
  CHECK(t.IsSpecial(2));
  CHECK_FALSE(t.IsSpecial(100));
  CHECK(t.TokenBytes(2, false) == "<|im_end|>");
  CHECK(t.TokenBytes(2, true) == "");
  CHECK_FALSE(t.strips_leading_space());
  CHECK(EncodeText(t, "a<|im_end|>", true, true) == EncodeText(t, "a<|im_end|>", true, false));
}

TEST_CASE("Qwen2.5-Coder: user-defined and unused tokens") {
  const Loaded loaded = Load("qwen2.5-coder-0.5b-instruct");
  if (loaded.tokenizer == nullptr) return;
  const Tokenizer& t = *loaded.tokenizer;
  CHECK(t.vocab_size() == 151936);
  CHECK(EncodeText(t, "<tool_call>", false) == std::vector<int32_t>{151657});
  CHECK(t.TokenBytes(151657, true) == "<tool_call>");
  CHECK(t.TokenBytes(151935, false) == "");
  CHECK(std::vector<int32_t>(t.eos_ids().begin(), t.eos_ids().end()) ==
        std::vector<int32_t>{151643, 151645});
}

}  // namespace
}  // namespace gloam
