// Names that came from a file, made safe and short for an error's one line.
#pragma once

#include <string>
#include <string_view>

#include "base/logging.h"

namespace gloam {

// `name` in single quotes, control characters escaped, cut after 80 bytes.
inline std::string QuoteName(std::string_view name) {
  constexpr size_t kMaxBytes = 80;
  const bool cut = name.size() > kMaxBytes;
  return "'" + EscapeForLog(name.substr(0, kMaxBytes)) + (cut ? "...'" : "'");
}

}  // namespace gloam
