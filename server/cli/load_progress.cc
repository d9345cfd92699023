#include "server/cli/load_progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include "fmt/format.h"

namespace gloam {
namespace {

constexpr int kBarWidth = 30;
constexpr std::chrono::milliseconds kRedraw{50};
constexpr std::chrono::seconds kLineInterval{2};

}  // namespace

LoadProgress::LoadProgress(std::string name)
    : name_(std::move(name)), is_terminal_(isatty(STDERR_FILENO) != 0), last_draw_(start_) {}

void LoadProgress::Update(int64_t bytes_done, int64_t bytes_total) {
  if (bytes_total <= 0) return;
  const auto now = std::chrono::steady_clock::now();
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double share = static_cast<double>(bytes_done) / static_cast<double>(bytes_total);
  const double rate = seconds > 0 ? static_cast<double>(bytes_done) / seconds / 1e9 : 0;
  const std::string facts =
      fmt::format("{:.2f} / {:.2f} GB, {:.1f} GB/s", static_cast<double>(bytes_done) / 1e9,
                  static_cast<double>(bytes_total) / 1e9, rate);
  if (is_terminal_) {
    if (bytes_done < bytes_total && now - last_draw_ < kRedraw) return;
    last_draw_ = now;
    bar_open_ = true;
    const int filled = static_cast<int>(share * kBarWidth);
    fmt::print(stderr, "\rLoading {} [{:=<{}}{: <{}}] {}", name_, "", filled, "",
               kBarWidth - filled, facts);
    std::fflush(stderr);
    return;
  }
  if (bytes_done < bytes_total && now - last_draw_ < kLineInterval) return;
  last_draw_ = now;
  fmt::print(stderr, "Loading {}: {:.0f} %, {}\n", name_, share * 100, facts);
}

void LoadProgress::Finish() {
  if (std::exchange(bar_open_, false)) fmt::print(stderr, "\n");
}

}  // namespace gloam
