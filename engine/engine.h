// Engine: owns the model, the KV cache, the scheduler and the one thread that steps them. Server
// threads submit requests and cancel them; everything else happens on the engine thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "engine/request.h"
#include "models/model.h"

namespace gloam {

class MetricsRegistry;
struct MemoryPlan;

struct EngineOptions {
  int max_model_len = 0;              // 0: the model's own context length
  int max_num_seqs = 256;             // sequences in one step
  int max_num_batched_tokens = 2048;  // tokens in one step (prefill chunks share it with decode)
  int max_tokens_beside_decode = 0;   // the same where a sequence decodes; 0: as many
  int max_queued_requests = 1024;
  int64_t num_kv_blocks = 0;                  // 0: from kv_cache_bytes
  int64_t kv_cache_bytes = int64_t{1} << 30;  // 0, on a GPU: what gpu_memory_utilization leaves
  double gpu_memory_utilization = 0.90;       // of the GPU's memory, what else is in use included
  DType kv_cache_dtype = DType::kBF16;
  bool enable_prefix_caching = true;
  double step_timeout = 0;  // seconds, after which a step counts as hanging; 0: never
  SidecarConfig sidecars;   // kept beside every block: what the enabled policies read
};

// A moment's state, for /metrics, the statistics line and tests.
struct EngineStats {
  int num_waiting = 0;
  int num_running = 0;
  int64_t num_blocks_total = 0;
  int64_t num_blocks_in_use = 0;  // held by live sequences; cached but unreferenced blocks are free
  int64_t prompt_tokens_total = 0;
  int64_t generation_tokens_total = 0;
  int64_t num_preemptions_total = 0;
  int64_t prefix_cache_queries = 0;  // in tokens
  int64_t prefix_cache_hits = 0;
};

using RequestHandle = uint64_t;

class Engine {
 public:
  virtual ~Engine() = default;

  // `ops` and `metrics` must outlive the engine. Plans the KV cache, runs one real forward pass,
  // and starts the engine thread. Errors: kResourceExhausted saying what would fit,
  // kInvalidArgument naming the option.
  [[nodiscard]] static StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                                Ops& ops,
                                                                std::unique_ptr<Model> model,
                                                                const Tokenizer& tokenizer,
                                                                MetricsRegistry& metrics);

  // Any thread, never waits. Errors: kInvalidArgument (can never fit: says how many tokens would),
  // kResourceExhausted (queue full), kUnavailable (draining or failed).
  // After an OK the sink gets exactly one OnEnd, whatever happens.
  [[nodiscard]] virtual StatusOr<RequestHandle> Submit(Request request,
                                                       std::shared_ptr<OutputSink> sink) = 0;

  // Frees the request's blocks within one step, in every state; unknown or ended handles are
  // ignored. Any thread, never waits.
  virtual void Cancel(RequestHandle handle) = 0;

  virtual EngineStats stats() const = 0;  // any thread
  virtual int max_model_len() const = 0;
  virtual const ModelConfig& model_config() const = 0;
  virtual const MemoryPlan* memory_plan() const = 0;  // of a GPU; null on the CPU
  // A fatal error happened, or a step hangs: /live answers 503, and the process should end. After a
  // step that hangs the engine must not be destroyed.
  virtual bool failed() const = 0;

  // Refuses new requests, lets running ones finish until `deadline`, cancels the rest, and returns
  // when all have ended or a step hangs. Any thread but the engine's.
  virtual void Drain(std::chrono::steady_clock::time_point deadline) = 0;
};

}  // namespace gloam
