// MetricsRegistry: every Prometheus metric of the process. The engine thread updates the members
// below; the server adds its own families through registry(). All of it is safe on any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine/request.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace gloam {

// Names, types and bucket boundaries are vLLM's with the prefix `gloam:`, so that its dashboards
// work after a search and replace.
class MetricsRegistry {
 public:
  // `model_name` becomes the label `model_name` of every engine metric, as in vLLM.
  explicit MetricsRegistry(const std::string& model_name);

  // The text exposition format, for GET /metrics.
  std::string Serialize() const;

  // For metrics that are not the engine's. Names should start with "gloam:".
  prometheus::Registry& registry() { return *registry_; }

  // Publishes gloam:cache_config_info, whose labels are the cache's facts and whose value is 1.
  void SetCacheConfig(int block_size, int64_t num_blocks);

  // Adds one ended request's sparsity to its policy's metrics; a policy given in the request counts
  // as "custom".
  void ObserveSparsity(const SparsityUsage& usage);

  // The counter of ended answers with this reason.
  prometheus::Counter& RequestSuccess(FinishReason reason);

 private:
  prometheus::Gauge& AddGauge(const char* name, const char* help);
  prometheus::Counter& AddCounter(const char* name, const char* help);
  prometheus::Histogram& AddHistogram(const char* name, const char* help,
                                      const prometheus::Histogram::BucketBoundaries& boundaries);
  prometheus::Family<prometheus::Counter>& AddCounters(const char* name, const char* help);
  prometheus::Family<prometheus::Histogram>& AddHistograms(const char* name, const char* help);

  std::shared_ptr<prometheus::Registry> registry_;
  prometheus::Labels labels_;
  prometheus::Family<prometheus::Counter>& request_success_;
  prometheus::Family<prometheus::Histogram>& sparsity_kept_tokens_;
  prometheus::Family<prometheus::Histogram>& sparsity_loaded_share_;
  prometheus::Family<prometheus::Counter>& sparsity_sparse_steps_;
  prometheus::Family<prometheus::Counter>& sparsity_bypassed_steps_;

 public:
  prometheus::Gauge& num_requests_running;
  prometheus::Gauge& num_requests_waiting;
  prometheus::Gauge& kv_cache_usage;  // 0 to 1, blocks held by live sequences
  prometheus::Counter& prompt_tokens;
  prometheus::Counter& generation_tokens;
  prometheus::Counter& num_preemptions;
  prometheus::Counter& prefix_cache_queries;  // tokens looked up
  prometheus::Counter& prefix_cache_hits;     // tokens found
  prometheus::Histogram& time_to_first_token;
  prometheus::Histogram& inter_token_latency;
  prometheus::Histogram& e2e_request_latency;
  prometheus::Histogram& request_queue_time;
};

}  // namespace gloam
