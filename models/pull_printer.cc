#include "models/pull_printer.h"

#include "fmt/format.h"

namespace gloam {
namespace {

constexpr int kBarWidth = 30;

std::string_view NameOf(PullProgress::Stage stage) {
  return stage == PullProgress::Stage::kDownload ? "downloading" : "checking";
}

double Megabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

double ShareOf(const PullProgress& progress) {
  return progress.bytes_total > 0
             ? static_cast<double>(progress.bytes_done) / static_cast<double>(progress.bytes_total)
             : 0.0;
}

std::string PartOf(const PullProgress& progress) {
  if (progress.num_parts < 2 || progress.stage != PullProgress::Stage::kDownload) return "";
  return fmt::format(", part {} of {}", progress.part + 1, progress.num_parts);
}

}  // namespace

PullPrinter::PullPrinter(std::ostream& out, bool is_terminal)
    : out_(out), is_terminal_(is_terminal) {}

void PullPrinter::Show(const PullProgress& progress) {
  if (!started_ || progress.stage != stage_) {
    Finish();
    started_ = true;
    stage_ = progress.stage;
    start_ = std::chrono::steady_clock::now();
    start_bytes_ = progress.bytes_done;
    last_tenth_ = -1;
  }
  if (is_terminal_) {
    ShowBar(progress);
  } else {
    ShowLine(progress);
  }
}

void PullPrinter::Finish() {
  if (bar_open_) out_ << std::endl;
  bar_open_ = false;
}

std::string PullPrinter::Rate(const PullProgress& progress) {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  if (elapsed.count() < 0.5) return "";
  return fmt::format(", {:.1f} MB/s",
                     Megabytes(progress.bytes_done - start_bytes_) / elapsed.count());
}

void PullPrinter::ShowBar(const PullProgress& progress) {
  const int filled = static_cast<int>(ShareOf(progress) * kBarWidth);
  // "\033[K" clears what an earlier, longer text left behind.
  out_ << fmt::format("\r{:<11} [{}{}] {:3.0f}%  {:.1f} of {:.1f} MB{}{}\033[K", NameOf(stage_),
                      std::string(filled, '#'), std::string(kBarWidth - filled, ' '),
                      100 * ShareOf(progress), Megabytes(progress.bytes_done),
                      Megabytes(progress.bytes_total), Rate(progress), PartOf(progress))
       << std::flush;
  bar_open_ = true;
}

void PullPrinter::ShowLine(const PullProgress& progress) {
  const int tenth = static_cast<int>(ShareOf(progress) * 10);
  if (tenth <= last_tenth_) return;
  if (stage_ == PullProgress::Stage::kCheck && tenth < 10) return;  // takes seconds: one line
  last_tenth_ = tenth;
  out_ << fmt::format("{} {:3.0f}%: {:.1f} of {:.1f} MB{}{}", NameOf(stage_),
                      100 * ShareOf(progress), Megabytes(progress.bytes_done),
                      Megabytes(progress.bytes_total), Rate(progress), PartOf(progress))
       << std::endl;
}

}  // namespace gloam
