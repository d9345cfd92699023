// Process-wide logging through spdlog: asynchronous, to stderr, never blocking its caller (when
// the queue is full the oldest lines are dropped). Call from any thread.
#pragma once

#include <string_view>

#include "base/status.h"
#include "spdlog/spdlog.h"

namespace gloam {

enum class LogFormat { kText, kJson };

// Installs the logger. `level` is one of trace, debug, info, warn, error, off.
// Errors: kInvalidArgument naming the level. Call once, before other threads start.
[[nodiscard]] Status InitLogging(std::string_view level, LogFormat format);

// `text` with control characters, quotes and invalid UTF-8 escaped: for anything that came from a
// client, before it enters a log line.
std::string EscapeForLog(std::string_view text);

}  // namespace gloam
