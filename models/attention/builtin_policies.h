// Files of configs/, embedded at build time (models/CMakeLists.txt).
#pragma once

#include <span>
#include <string_view>

namespace gloam {

struct BuiltinPolicy {
  std::string_view file_stem;
  std::string_view json;
};

// In the order in which they get their sidecars.
std::span<const BuiltinPolicy> BuiltinPolicies();

}  // namespace gloam
