// LoadProgress: shows the reading of weights on stderr: a bar with GB/s on a terminal, a line
// every two seconds and at the end elsewhere. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace gloam {

class LoadProgress {
 public:
  explicit LoadProgress(std::string name);

  void Update(int64_t bytes_done, int64_t bytes_total);
  void Finish();  // ends the bar's line

 private:
  const std::string name_;
  const bool is_terminal_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_draw_;
  bool bar_open_ = false;
};

}  // namespace gloam
