// Request: a validated generation request, the same whichever front end it came through; and what
// comes back. Front ends build requests (server/), Engine::Submit takes them, answers arrive in an
// OutputSink.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/sample.h"
#include "kernels/sparsity_policy.h"

namespace gloam {

// Ranges are those that the codecs enforce (../server); the engine relies on them.
struct SamplingParams {
  float temperature = 1.0f;         // [0, 2]; 0: greedy
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]
  int top_k = 0;                    // 0: all
  float repetition_penalty = 1.0f;  // (0, 2]
  float frequency_penalty = 0.0f;   // [-2, 2]
  float presence_penalty = 0.0f;    // [-2, 2]
  std::optional<uint64_t> seed;
  std::optional<int> max_tokens;  // empty: up to the end of the context
  int min_tokens = 0;
  bool ignore_eos = false;
  std::vector<std::string> stop;  // at most 4, none empty
  std::vector<int32_t> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool skip_special_tokens = true;
  std::vector<std::pair<int32_t, float>> logit_bias;  // ids in the vocabulary, [-100, 100]
  int num_logprobs = -1;         // -1: none; n: the drawn token's and the n most likely
  int num_prompt_logprobs = -1;  // the same for the prompt's tokens
};

struct Request {
  std::string id;               // for logs and answers; unique per process
  std::vector<int32_t> prompt;  // token ids, not empty
  SamplingParams sampling;
  // How decode attention chooses its tokens; its sidecars are among EngineOptions::sidecars. Null:
  // dense.
  std::shared_ptr<const SparsityPolicy> sparsity;
  // So many of the prompt's last tokens are computed as decode steps are, under the policy: for
  // evaluations, whose text is given. Less than the prompt's length.
  int num_decoded_prompt_tokens = 0;
  int n = 1;         // independent answers to the same prompt
  int priority = 0;  // lower runs first, as in vLLM; equal: first come
  std::optional<std::chrono::steady_clock::time_point> deadline;
};

enum class FinishReason : uint8_t {
  kStop,       // end-of-sequence token, stop string or stop token
  kLength,     // max_tokens or the end of the context
  kCancelled,  // Engine::Cancel, or the sink overflowed
  kError,      // see OutputDelta::error
};

// One answer's progress. Text is always whole UTF-8 characters; what could still become a stop
// string is held back.
struct OutputDelta {
  int index = 0;  // which of the n answers
  std::string text;
  std::vector<int32_t> tokens;
  std::vector<SampleResult> logprobs;         // one per token, when asked for
  std::optional<FinishReason> finish_reason;  // set on the answer's last delta
  std::optional<std::string> stop_reason;     // the stop string, or the stop token's id in digits
  Status error;                               // with kError
};

// What sparse attention did over one request. Means are over the decode steps that ran sparse,
// their sparse layers and heads; 0 where no step did.
struct SparsityUsage {
  std::string policy;                    // its name; empty for a policy given in the request
  double kept_tokens_per_head = 0;       // per query head: the paper's budget
  double loaded_tokens_per_kv_head = 0;  // whose keys and values were read: union of the group
  double loaded_share = 0;               // of the context, 0 to 1
  double context_tokens = 0;
  int64_t sparse_steps = 0;    // decoded tokens under the policy
  int64_t bypassed_steps = 0;  // decoded tokens that ran dense: context below bypass_below_tokens
  std::optional<double> true_mass;  // of the full softmax, 0 to 1; with report_true_mass
};

// How metrics and answers call the policy.
inline std::string_view PolicyLabel(const SparsityUsage& usage) {
  return usage.policy.empty() ? std::string_view("custom") : usage.policy;
}

// Facts of the whole request, delivered once, after the last answer ended.
struct RequestSummary {
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;                  // prompt tokens found in the prefix cache
  std::optional<SparsityUsage> sparsity;  // of requests with a policy
};

// Receives one request's output. The engine thread calls it and must never wait for it: an
// implementation queues and returns. Exactly one OnEnd per accepted request, after which the sink
// is released.
class OutputSink {
 public:
  virtual ~OutputSink() = default;

  // Log-probabilities of the prompt: one entry per prompt token, the first without a value
  // (token set, top empty, logprob.rank 0). Before any delta; only when asked for.
  virtual void OnPromptLogprobs(std::vector<SampleResult> logprobs) = 0;

  // False: the reader is too slow and the sink's bound is reached; the engine cancels the request.
  [[nodiscard]] virtual bool OnDelta(OutputDelta delta) = 0;

  virtual void OnEnd(const RequestSummary& summary) = 0;
};

}  // namespace gloam
