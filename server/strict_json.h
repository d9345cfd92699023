// JSON as it comes from clients: parsed strictly, with the faults that lenient parsers let through
// (duplicate keys, deep nesting, NUL characters, trailing bytes) refused. And JSON text written by
// hand where speed matters.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "nlohmann/json.hpp"

namespace gloam {

inline constexpr int kMaxJsonDepth = 64;

// Errors: kInvalidArgument saying what is wrong and at which byte; never repeats the client's text.
// Keys keep their order, as templates print tools and arguments the way they came; looking one up
// takes a pass over its object.
[[nodiscard]] StatusOr<nlohmann::ordered_json> ParseStrictJson(std::string_view text);

// Appends `text` as a JSON string, quotes included; invalid UTF-8 becomes U+FFFD.
void AppendJsonString(std::string_view text, std::string* out);

// A JSON value as compact text; invalid UTF-8 in strings becomes U+FFFD.
std::string DumpJson(const nlohmann::json& value);

}  // namespace gloam
