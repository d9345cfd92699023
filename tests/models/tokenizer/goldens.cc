#include "tests/models/tokenizer/goldens.h"

#include <fstream>
#include <iterator>
#include <sstream>

#include "catch2/catch.hpp"
#include "fmt/ranges.h"

namespace gloam {

std::string ReadGoldenBytes(const std::string& name) {
  const std::string path = "tests/goldens/" + name;
  std::ifstream file(path, std::ios::binary);
  INFO(path);
  REQUIRE(file.good());
  return {std::istreambuf_iterator<char>(file), {}};
}

nlohmann::json ReadGolden(const std::string& name) {
  return nlohmann::json::parse(ReadGoldenBytes(name));
}

std::vector<int32_t> ParseIds(const std::string& text) {
  std::istringstream in(text);
  return {std::istream_iterator<int32_t>(in), {}};
}

std::vector<int32_t> EncodeText(const Tokenizer& tokenizer, std::string_view text,
                                bool allow_special, bool add_special) {
  const TextPart part{text, allow_special};
  auto ids = tokenizer.Encode({&part, 1}, add_special);
  INFO(ids.status());
  REQUIRE(ids.ok());
  return *std::move(ids);
}

void CheckGoldenIds(const Tokenizer& tokenizer, const std::vector<std::string>& lines,
                    const nlohmann::json& golden) {
  constexpr int kMaxReports = 10;
  REQUIRE(golden["plain"].size() == lines.size());
  int num_wrong = 0;
  std::string report;
  const auto check = [&](const std::string& line, bool allow_special, const std::string& expected) {
    const std::vector<int32_t> ids = EncodeText(tokenizer, line, allow_special);
    if (ids == ParseIds(expected)) return;
    if (++num_wrong > kMaxReports) return;
    report += fmt::format("{}\n  expected {}\n  got      {}\n",
                          nlohmann::json(line).dump(-1, ' ', true), expected, fmt::join(ids, " "));
  };
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string& plain = golden["plain"][i].get_ref<const std::string&>();
    const auto special = golden["special"].find(std::to_string(i));
    check(lines[i], false, plain);
    check(lines[i], true, special == golden["special"].end() ? plain : special->get<std::string>());
  }
  INFO(report);
  CHECK(num_wrong == 0);
}

}  // namespace gloam
