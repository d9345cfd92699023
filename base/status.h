// Error values for every fault that a client, a file or the environment can cause.
// Absl's Status is used as it is; this header adds makers that format their message, and the two
// propagation macros. A programmer's fault is not a Status: see base/check.h.
#pragma once

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "fmt/format.h"

namespace gloam {

using absl::OkStatus;
using absl::Status;
using absl::StatusCode;
using absl::StatusOr;

// MakeStatus(StatusCode::kNotFound, "no file {}", path): an error with a formatted message.
template <typename... Args>
[[nodiscard]] Status MakeStatus(StatusCode code, fmt::format_string<Args...> format,
                                Args&&... args) {
  return Status(code, fmt::format(format, std::forward<Args>(args)...));
}

template <typename... Args>
[[nodiscard]] Status InvalidArgument(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kInvalidArgument, format, std::forward<Args>(args)...);
}

template <typename... Args>
[[nodiscard]] Status NotFound(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kNotFound, format, std::forward<Args>(args)...);
}

template <typename... Args>
[[nodiscard]] Status Unimplemented(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kUnimplemented, format, std::forward<Args>(args)...);
}

template <typename... Args>
[[nodiscard]] Status ResourceExhausted(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kResourceExhausted, format, std::forward<Args>(args)...);
}

template <typename... Args>
[[nodiscard]] Status Unavailable(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kUnavailable, format, std::forward<Args>(args)...);
}

template <typename... Args>
[[nodiscard]] Status Internal(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kInternal, format, std::forward<Args>(args)...);
}

// The message as a std::string (absl's string_view is a type of its own in Debian's build).
inline std::string MessageOf(const Status& status) { return std::string(status.message()); }

}  // namespace gloam

#define GLOAM_CONCAT_INNER(a, b) a##b
#define GLOAM_CONCAT(a, b) GLOAM_CONCAT_INNER(a, b)

// Returns from the current function when `expr` (a Status) is not OK.
#define GLOAM_RETURN_IF_ERROR(expr)              \
  do {                                           \
    ::absl::Status gloam_status = (expr);        \
    if (!gloam_status.ok()) return gloam_status; \
  } while (false)

// GLOAM_ASSIGN_OR_RETURN(auto x, MakeX()): assigns the value, or returns the error.
#define GLOAM_ASSIGN_OR_RETURN(lhs, expr) \
  GLOAM_ASSIGN_OR_RETURN_IMPL(GLOAM_CONCAT(gloam_statusor_, __LINE__), lhs, expr)
#define GLOAM_ASSIGN_OR_RETURN_IMPL(var, lhs, expr) \
  auto var = (expr);                                \
  if (!var.ok()) return std::move(var).status();    \
  lhs = std::move(var).value()
