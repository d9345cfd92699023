#include "server/api_error.h"

#include "absl/strings/cord.h"

namespace gloam {
namespace {

constexpr char kParamUrl[] = "gloam/param";
constexpr char kCodeUrl[] = "gloam/code";

std::string PayloadOf(const Status& status, const char* url) {
  const auto payload = status.GetPayload(url);
  return payload ? std::string(*payload) : std::string();
}

}  // namespace

Status WithParam(Status status, std::string_view param) {
  status.SetPayload(kParamUrl, absl::Cord(std::string(param)));
  return status;
}

Status WithErrorCode(Status status, std::string_view code) {
  status.SetPayload(kCodeUrl, absl::Cord(std::string(code)));
  return status;
}

std::string ParamOf(const Status& status) { return PayloadOf(status, kParamUrl); }

std::string ErrorCodeOf(const Status& status) { return PayloadOf(status, kCodeUrl); }

int HttpStatusOf(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return 200;
    case StatusCode::kInvalidArgument:
    case StatusCode::kFailedPrecondition:
    case StatusCode::kOutOfRange:
    case StatusCode::kUnimplemented:  // a field's value that this server does not serve
      return 400;
    case StatusCode::kUnauthenticated:
      return 401;
    case StatusCode::kNotFound:
      return 404;
    case StatusCode::kResourceExhausted:
      return ErrorCodeOf(status) == kRateLimitCode ? 429 : 503;
    case StatusCode::kCancelled:
      return 499;
    case StatusCode::kUnavailable:
      return 503;
    case StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string_view ErrorTypeOf(const Status& status) {
  const int http_status = HttpStatusOf(status);
  if (http_status == 429) return "rate_limit_error";
  return http_status >= 500 ? "server_error" : "invalid_request_error";
}

}  // namespace gloam
