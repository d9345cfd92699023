#include "engine/statistics_log.h"

#include <algorithm>

#include "base/logging.h"

namespace gloam {
namespace {

constexpr std::chrono::seconds kInterval{10};

}  // namespace

void StatisticsLog::Update(const EngineStats& stats, Clock::time_point now) {
  if (now - last_time_ < kInterval) return;
  const double seconds = std::chrono::duration<double>(now - last_time_).count();
  const int64_t num_prompt = stats.prompt_tokens_total - last_.prompt_tokens_total;
  const int64_t num_generated = stats.generation_tokens_total - last_.generation_tokens_total;
  if (num_prompt + num_generated > 0 || stats.num_running + stats.num_waiting > 0) {
    const int64_t num_queries = stats.prefix_cache_queries - last_.prefix_cache_queries;
    const int64_t num_hits = stats.prefix_cache_hits - last_.prefix_cache_hits;
    spdlog::info(
        "prompt {:.1f} tok/s, generation {:.1f} tok/s, running {}, waiting {}, KV cache {:.1f}%, "
        "prefix cache hits {:.1f}%",
        num_prompt / seconds, num_generated / seconds, stats.num_running, stats.num_waiting,
        100.0 * stats.num_blocks_in_use / std::max<int64_t>(1, stats.num_blocks_total),
        100.0 * num_hits / std::max<int64_t>(1, num_queries));
  }
  last_ = stats;
  last_time_ = now;
}

}  // namespace gloam
