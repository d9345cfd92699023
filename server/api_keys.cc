#include "server/api_keys.h"

#include <cstddef>

namespace gloam {
namespace {

constexpr std::string_view kScheme = "Bearer ";

// Touches every byte of `presented`, whether or not an earlier one is wrong.
bool EqualInConstantTime(std::string_view key, std::string_view presented) {
  unsigned difference = key.size() == presented.size() ? 0 : 1;
  for (size_t i = 0; i < presented.size(); ++i) {
    const char expected = key.empty() ? '\0' : key[i % key.size()];
    difference |= static_cast<unsigned char>(presented[i] ^ expected);
  }
  return difference == 0;
}

}  // namespace

bool ApiKeys::Allow(std::string_view authorization) const {
  if (keys_.empty()) return true;
  if (!authorization.starts_with(kScheme)) return false;
  const std::string_view presented = authorization.substr(kScheme.size());
  bool allowed = false;
  for (const std::string& key : keys_) allowed |= EqualInConstantTime(key, presented);
  return allowed;
}

}  // namespace gloam
