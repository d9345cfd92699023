#include "base/logging.h"

#include "catch2/catch.hpp"

namespace gloam {
namespace {

TEST_CASE("EscapeForLog leaves no way to forge a line") {
  REQUIRE(EscapeForLog("plain text") == "plain text");
  REQUIRE(EscapeForLog("a\nb\r\"\\") == "a\\\\x0ab\\\\x0d\\\"\\\\");
  REQUIRE(EscapeForLog("\x1b[31m\xff") == "\\\\x1b[31m\\\\xff");
}

TEST_CASE("InitLogging names a bad level") {
  const Status status = InitLogging("loud", LogFormat::kText);
  REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(status.message()).find("loud") != std::string::npos);
}

}  // namespace
}  // namespace gloam
