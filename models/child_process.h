// Runs another program to its end: found by PATH, arguments as a vector, no shell.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace gloam {

struct ChildProcess {
  std::vector<std::string> arguments;                            // the program first
  std::vector<std::pair<std::string, std::string>> environment;  // set on top of our own
  std::filesystem::path output;  // its stdout and stderr go here, replacing the file
  std::function<void()> tick;    // called about five times a second while it runs; may be empty
};

// The exit code; 128 + the signal's number where a signal ended it. The program gets SIGTERM if
// this process dies first. Errors: kNotFound (no such program), kUnavailable (cannot start it).
[[nodiscard]] StatusOr<int> RunChild(const ChildProcess& child);

}  // namespace gloam
