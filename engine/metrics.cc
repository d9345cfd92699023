#include "engine/metrics.h"

#include "prometheus/text_serializer.h"

namespace gloam {
namespace {

using Boundaries = prometheus::Histogram::BucketBoundaries;

// Seconds; vLLM's v1/metrics/loggers.py.
const Boundaries kFirstTokenSeconds = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                       0.25,  0.5,   0.75, 1.0,  2.5,  5.0,  7.5,  10.0,
                                       20.0,  40.0,  80.0, 160,  640,  2560};
const Boundaries kTokenSeconds = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,  0.3,  0.4, 0.5,
                                  0.75, 1.0,   2.5,  5.0,   7.5, 10.0, 20.0, 40.0, 80.0};
const Boundaries kRequestSeconds = {0.3,  0.5,   0.8,   1.0,   1.5,   2.0,    2.5,
                                    5.0,  10.0,  15.0,  20.0,  30.0,  40.0,   50.0,
                                    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};

// Tokens, and a share of the context.
const Boundaries kKeptTokens = {16,   32,   64,   128,  192,  256,   384,   512,  768,
                                1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536};
const Boundaries kLoadedShare = {0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1,
                                 0.15,  0.2,  0.3,  0.4,  0.5,  0.75,  1.0};

prometheus::Labels LabelsOf(const std::string& model_name) {
  if (model_name.empty()) return {};
  return {{"model_name", model_name}};
}

const char* FinishedReason(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

}  // namespace

MetricsRegistry::MetricsRegistry(const std::string& model_name)
    : registry_(std::make_shared<prometheus::Registry>()),
      labels_(LabelsOf(model_name)),
      request_success_(
          AddCounters("gloam:request_success_total", "Answers that ended, by reason.")),
      sparsity_kept_tokens_(AddHistograms("gloam:sparsity_kept_tokens_per_head",
                                          "A request's mean of tokens kept per query head.")),
      sparsity_loaded_share_(
          AddHistograms("gloam:sparsity_loaded_share",
                        "A request's mean share of the context that was read, 0 to 1.")),
      sparsity_sparse_steps_(AddCounters("gloam:sparsity_sparse_steps_total",
                                         "Tokens decoded with sparse attention.")),
      sparsity_bypassed_steps_(
          AddCounters("gloam:sparsity_bypassed_steps_total",
                      "Tokens decoded densely because the context was still short.")),
      num_requests_running(AddGauge("gloam:num_requests_running", "Answers in the running batch.")),
      num_requests_waiting(
          AddGauge("gloam:num_requests_waiting", "Answers that wait for a place in the batch.")),
      kv_cache_usage(AddGauge("gloam:kv_cache_usage_perc",
                              "Share of the KV cache blocks held by live answers, 0 to 1.")),
      prompt_tokens(AddCounter("gloam:prompt_tokens_total", "Prompt tokens processed.")),
      generation_tokens(AddCounter("gloam:generation_tokens_total", "Tokens generated.")),
      num_preemptions(AddCounter("gloam:num_preemptions_total",
                                 "Answers put back because the KV cache was full.")),
      prefix_cache_queries(
          AddCounter("gloam:prefix_cache_queries_total", "Tokens looked up in the prefix cache.")),
      prefix_cache_hits(
          AddCounter("gloam:prefix_cache_hits_total", "Tokens found in the prefix cache.")),
      time_to_first_token(AddHistogram("gloam:time_to_first_token_seconds",
                                       "From submission to an answer's first token.",
                                       kFirstTokenSeconds)),
      inter_token_latency(AddHistogram("gloam:inter_token_latency_seconds",
                                       "Between two tokens of one answer.", kTokenSeconds)),
      e2e_request_latency(AddHistogram("gloam:e2e_request_latency_seconds",
                                       "From submission to an answer's end.", kRequestSeconds)),
      request_queue_time(AddHistogram("gloam:request_queue_time_seconds",
                                      "From submission to a request's first step.",
                                      kRequestSeconds)) {
  // All label values exist from the start, so that rates do not begin with a gap.
  for (FinishReason reason : {FinishReason::kStop, FinishReason::kLength, FinishReason::kCancelled,
                              FinishReason::kError}) {
    RequestSuccess(reason);
  }
}

prometheus::Gauge& MetricsRegistry::AddGauge(const char* name, const char* help) {
  return prometheus::BuildGauge()
      .Name(name)
      .Help(help)
      .Labels(labels_)
      .Register(*registry_)
      .Add({});
}

prometheus::Counter& MetricsRegistry::AddCounter(const char* name, const char* help) {
  return AddCounters(name, help).Add({});
}

prometheus::Histogram& MetricsRegistry::AddHistogram(const char* name, const char* help,
                                                     const Boundaries& boundaries) {
  return AddHistograms(name, help).Add({}, boundaries);
}

prometheus::Family<prometheus::Counter>& MetricsRegistry::AddCounters(const char* name,
                                                                      const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Labels(labels_).Register(*registry_);
}

prometheus::Family<prometheus::Histogram>& MetricsRegistry::AddHistograms(const char* name,
                                                                          const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Labels(labels_).Register(*registry_);
}

void MetricsRegistry::ObserveSparsity(const SparsityUsage& usage) {
  const prometheus::Labels labels = {{"policy", std::string(PolicyLabel(usage))}};
  sparsity_sparse_steps_.Add(labels).Increment(static_cast<double>(usage.sparse_steps));
  sparsity_bypassed_steps_.Add(labels).Increment(static_cast<double>(usage.bypassed_steps));
  auto& kept_tokens = sparsity_kept_tokens_.Add(labels, kKeptTokens);
  auto& loaded_share = sparsity_loaded_share_.Add(labels, kLoadedShare);
  if (usage.sparse_steps == 0) return;
  kept_tokens.Observe(usage.kept_tokens_per_head);
  loaded_share.Observe(usage.loaded_share);
}

void MetricsRegistry::SetCacheConfig(int block_size, int64_t num_blocks) {
  prometheus::BuildGauge()
      .Name("gloam:cache_config_info")
      .Help("Facts of the KV cache, as labels.")
      .Labels(labels_)
      .Register(*registry_)
      .Add({{"block_size", std::to_string(block_size)},
            {"num_gpu_blocks", std::to_string(num_blocks)}})
      .Set(1);
}

prometheus::Counter& MetricsRegistry::RequestSuccess(FinishReason reason) {
  return request_success_.Add({{"finished_reason", FinishedReason(reason)}});
}

std::string MetricsRegistry::Serialize() const {
  return prometheus::TextSerializer().Serialize(registry_->Collect());
}

}  // namespace gloam
