#include "server/http/types.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <string_view>

#include "fmt/format.h"

namespace gloam {

const char* HttpReason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 413:
      return "Content Too Large";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 499:
      return "Client Closed Request";
    case 500:
      return "Internal Server Error";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    default:
      return "Unknown";
  }
}

std::string SaneRequestId(std::string_view text) {
  constexpr size_t kMaxLength = 128;
  const bool sane =
      !text.empty() && text.size() <= kMaxLength &&
      std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 127; });
  if (sane) return std::string(text);
  static const uint32_t start = std::random_device()();
  static std::atomic<uint64_t> counter = 0;
  return fmt::format("req_{:08x}{:012x}", start, counter.fetch_add(1));
}

}  // namespace gloam
