// Shows a pull's progress: a bar that redraws itself on a terminal, a line per tenth elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <ostream>
#include <string>

#include "models/pull.h"

namespace gloam {

class PullPrinter {
 public:
  // `out` must outlive the printer.
  PullPrinter(std::ostream& out, bool is_terminal);

  void Show(const PullProgress& progress);  // one pull, one thread
  void Finish();                            // ends the bar's line

 private:
  void ShowBar(const PullProgress& progress);
  void ShowLine(const PullProgress& progress);
  std::string Rate(const PullProgress& progress);

  std::ostream& out_;
  const bool is_terminal_;
  bool bar_open_ = false;
  PullProgress::Stage stage_ = PullProgress::Stage::kDownload;
  int last_tenth_ = -1;
  std::chrono::steady_clock::time_point start_;  // of the stage
  int64_t start_bytes_ = 0;                      // which an earlier pull had left
  bool started_ = false;
};

}  // namespace gloam
