// GLOAM_CHECK: a programmer's fault ends the process with its place and condition, in release
// builds too. Faults of clients, files and the environment are Status values (base/status.h).
#pragma once

#include <cstdio>
#include <cstdlib>

namespace gloam::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace gloam::internal

#define GLOAM_CHECK(condition)                                        \
  do {                                                                \
    if (!(condition)) [[unlikely]]                                    \
      ::gloam::internal::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)
