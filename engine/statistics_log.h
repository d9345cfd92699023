// StatisticsLog: one line every 10 seconds while the engine is busy: rates, queue, cache.
// Owned and called by the engine thread.
#pragma once

#include <chrono>

#include "engine/engine.h"

namespace gloam {

class StatisticsLog {
 public:
  using Clock = std::chrono::steady_clock;

  // Writes the line when it is due and something happened since the last one.
  void Update(const EngineStats& stats, Clock::time_point now);

 private:
  Clock::time_point last_time_ = Clock::now();
  EngineStats last_;
};

}  // namespace gloam
