#include "engine/metrics.h"

#include "catch2/catch.hpp"

namespace gloam {
namespace {

TEST_CASE("metrics appear under vLLM's names with our prefix and the model's label") {
  MetricsRegistry metrics("tiny");
  metrics.SetCacheConfig(16, 128);
  metrics.num_requests_running.Set(3);
  metrics.prompt_tokens.Increment(5);
  metrics.time_to_first_token.Observe(0.03);
  metrics.RequestSuccess(FinishReason::kLength).Increment();
  const std::string text = metrics.Serialize();
  for (const char* line :
       {"gloam:num_requests_running{model_name=\"tiny\"} 3",
        "gloam:num_requests_waiting{model_name=\"tiny\"} 0",
        "gloam:kv_cache_usage_perc{model_name=\"tiny\"} 0",
        "gloam:prompt_tokens_total{model_name=\"tiny\"} 5",
        "gloam:generation_tokens_total{model_name=\"tiny\"} 0",
        "gloam:num_preemptions_total{model_name=\"tiny\"} 0",
        "gloam:prefix_cache_queries_total{model_name=\"tiny\"} 0",
        "gloam:prefix_cache_hits_total{model_name=\"tiny\"} 0",
        "gloam:cache_config_info{model_name=\"tiny\",block_size=\"16\",num_gpu_blocks=\"128\"} 1",
        "gloam:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} 1",
        "gloam:request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} 0",
        "gloam:time_to_first_token_seconds_bucket{model_name=\"tiny\",le=\"0.02\"} 0",
        "gloam:time_to_first_token_seconds_bucket{model_name=\"tiny\",le=\"0.04\"} 1",
        "gloam:inter_token_latency_seconds_count{model_name=\"tiny\"} 0",
        "gloam:e2e_request_latency_seconds_count{model_name=\"tiny\"} 0",
        "gloam:request_queue_time_seconds_count{model_name=\"tiny\"} 0"}) {
    CAPTURE(line);
    CHECK(text.find(line) != std::string::npos);
  }
}

TEST_CASE("sparsity is counted by policy") {
  MetricsRegistry metrics("tiny");
  SparsityUsage usage;
  usage.policy = "twilight";
  usage.kept_tokens_per_head = 100;
  usage.loaded_share = 0.04;
  usage.sparse_steps = 7;
  usage.bypassed_steps = 2;
  metrics.ObserveSparsity(usage);
  metrics.ObserveSparsity(usage);
  usage.policy.clear();  // given in the request
  usage.sparse_steps = 0;
  metrics.ObserveSparsity(usage);
  const std::string text = metrics.Serialize();
  for (const char* line :
       {"gloam:sparsity_sparse_steps_total{model_name=\"tiny\",policy=\"twilight\"} 14",
        "gloam:sparsity_bypassed_steps_total{model_name=\"tiny\",policy=\"twilight\"} 4",
        "gloam:sparsity_kept_tokens_per_head_bucket{model_name=\"tiny\",policy=\"twilight\","
        "le=\"64\"} 0",
        "gloam:sparsity_kept_tokens_per_head_bucket{model_name=\"tiny\",policy=\"twilight\","
        "le=\"128\"} 2",
        "gloam:sparsity_loaded_share_bucket{model_name=\"tiny\",policy=\"twilight\",le=\"0.05\"} "
        "2",
        "gloam:sparsity_bypassed_steps_total{model_name=\"tiny\",policy=\"custom\"} 2",
        "gloam:sparsity_kept_tokens_per_head_count{model_name=\"tiny\",policy=\"custom\"} 0"}) {
    CAPTURE(line);
    CHECK(text.find(line) != std::string::npos);
  }
}

TEST_CASE("the server adds its own metrics") {
  MetricsRegistry metrics("");
  prometheus::BuildCounter()
      .Name("gloam:http_requests_total")
      .Register(metrics.registry())
      .Add({{"route", "/health"}})
      .Increment();
  CHECK(metrics.Serialize().find("gloam:http_requests_total{route=\"/health\"} 1") !=
        std::string::npos);
}

}  // namespace
}  // namespace gloam
