// HttpClient: the little of HTTP that `gloam chat URL`, `gloam bench serve` and `gloam eval` need:
// plain requests to a server, whole or as a stream of events. Blocking; one thread at a time.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace gloam {

class HttpClient {
 public:
  // `url`: "http://HOST[:PORT]"; a path after it is dropped. `api_key` may be empty.
  // Errors: kInvalidArgument (url), kUnavailable (no server there).
  [[nodiscard]] static StatusOr<std::unique_ptr<HttpClient>> Connect(const std::string& url,
                                                                     std::string api_key);
  ~HttpClient();

  // The body of a 200. Errors: the server's message, or kUnavailable when the connection broke.
  [[nodiscard]] StatusOr<std::string> Get(const std::string& path);

  // Posts JSON; the body of a 200. Errors: as Get.
  [[nodiscard]] StatusOr<std::string> Post(const std::string& path, const std::string& body);

  // Posts JSON and calls `on_event` with the data of every event but "[DONE]".
  [[nodiscard]] Status PostForEvents(const std::string& path, const std::string& body,
                                     const std::function<void(std::string_view data)>& on_event);

  static bool IsUrl(std::string_view text) { return text.rfind("http://", 0) == 0; }

 private:
  struct Impl;
  explicit HttpClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gloam
