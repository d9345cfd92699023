// Reading of tests/goldens/tokenizer_*.json, and comparing with them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"

namespace gloam {

// A file of tests/goldens; fails the test when it is missing.
nlohmann::json ReadGolden(const std::string& name);
std::string ReadGoldenBytes(const std::string& name);

// "1 23 4" -> {1, 23, 4}.
std::vector<int32_t> ParseIds(const std::string& text);

// Ids of one text; fails the test on an error.
std::vector<int32_t> EncodeText(const Tokenizer& tokenizer, std::string_view text,
                                bool allow_special, bool add_special = false);

// Checks each line's ids: as a client's content ("plain") and with special tokens allowed. Prints
// the first few lines that differ. `golden` has "plain" and "special" as the generator writes them.
void CheckGoldenIds(const Tokenizer& tokenizer, const std::vector<std::string>& lines,
                    const nlohmann::json& golden);

}  // namespace gloam
