#include "server/strict_json.h"

#include <string>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

std::string Nested(int depth) { return std::string(depth, '[') + std::string(depth, ']'); }

TEST_CASE("Strict JSON takes what is JSON") {
  const auto parsed =
      ParseStrictJson(" {\"a\": [1, -2, 2.5, true, null, \"\\u00e9\xc3\xa9\"], \"b\": {}} ");
  REQUIRE(parsed.ok());
  CHECK(parsed->at("a").size() == 6);
  CHECK(parsed->at("a")[5] == "éé");
  CHECK(ParseStrictJson(Nested(64)).ok());
  CHECK(ParseStrictJson("\"just a string\"").ok());
}

TEST_CASE("Strict JSON refuses the rest") {
  const std::string bad[] = {
      "",
      "{",
      "{\"a\": 1,}",
      "{\"a\": 1} x",
      "{\"a\": 1}{}",
      "{'a': 1}",
      "{\"a\": NaN}",
      "{\"a\": Infinity}",
      "{\"a\": 1e999}",
      "{\"a\": 01}",
      "{\"a\": 1, \"a\": 1}",
      "{\"o\": {\"a\": 1, \"b\": 2, \"a\": 3}}",
      "{\"a\": \"\xff\"}",
      "{\"a\": \"\xc3\"}",
      "{\"a\": \"\\ud800\"}",
      std::string("{\"a\": \"x\0y\"}", 13),
      std::string("{\"a\": 1}\0", 9),
      "{\"a\": \"x\\u0000y\"}",
      "{\"a\\u0000\": 1}",
      "{\"a\": \"\n\"}",
      Nested(65),
      Nested(100000),
      std::string(100000, '['),
  };
  for (const std::string& text : bad) {
    INFO(text.substr(0, 60));
    CHECK(ParseStrictJson(text).status().code() == StatusCode::kInvalidArgument);
  }
}

TEST_CASE("Keys keep their order, and a million of them are no burden") {
  CHECK(ParseStrictJson(R"({"b": 1, "a": {"z": 1, "c": 2}})")->dump() ==
        R"({"b":1,"a":{"z":1,"c":2}})");
  std::string many = "{";
  for (int i = 0; i < 1000000; ++i) many += "\"" + std::to_string(i) + "\":0,";
  many.back() = '}';
  const auto parsed = ParseStrictJson(many);
  REQUIRE(parsed.ok());
  CHECK(parsed->size() == 1000000);
}

TEST_CASE("Strings are escaped as JSON, whatever bytes they hold") {
  std::string all;
  for (int c = 0; c < 256; ++c) all += static_cast<char>(c);
  for (const std::string& text :
       {std::string(), std::string("plain"), std::string("\"\\/\b\f\n\r\t\x01\x7f"),
        std::string("é 漢 \xf0\x9f\x98\x80 \xe2\x80\xa8"), std::string("\xc3"), all}) {
    std::string escaped;
    AppendJsonString(text, &escaped);
    const auto parsed = nlohmann::json::parse(escaped);
    CHECK(parsed == nlohmann::json::parse(DumpJson(text)));
  }
}

}  // namespace
}  // namespace gloam
