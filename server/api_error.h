// Faults as a client sees them: a Status whose payloads carry OpenAI's `param` and `code`.
// gRPC answers with the status code itself; HTTP maps it (HttpStatusOf).
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace gloam {

// Values of the error body's `code`.
inline constexpr std::string_view kOverloadedCode = "server_is_overloaded";
inline constexpr std::string_view kRateLimitCode = "rate_limit_exceeded";
inline constexpr std::string_view kContextLengthCode = "context_length_exceeded";
inline constexpr std::string_view kModelNotFoundCode = "model_not_found";
inline constexpr std::string_view kInvalidApiKeyCode = "invalid_api_key";

// The same status with OpenAI's `param` (path of the offending field) or `code` attached.
Status WithParam(Status status, std::string_view param);
Status WithErrorCode(Status status, std::string_view code);

std::string ParamOf(const Status& status);      // "" when absent
std::string ErrorCodeOf(const Status& status);  // "" when absent

// kInvalidArgument with `param`. The message should state the value's range.
template <typename... Args>
[[nodiscard]] Status InvalidField(std::string_view param, fmt::format_string<Args...> format,
                                  Args&&... args) {
  return WithParam(InvalidArgument(format, std::forward<Args>(args)...), param);
}

// 400, 401, 404, 429, 499, 500, 503 or 504, by the status code and the error code.
int HttpStatusOf(const Status& status);

// OpenAI's error `type`: invalid_request_error (also for 401, as OpenAI does), rate_limit_error or
// server_error.
std::string_view ErrorTypeOf(const Status& status);

}  // namespace gloam
