#include "server/running_generation.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "models/attention/policy_json.h"
#include "server/api_error.h"

namespace gloam {
namespace {

constexpr size_t kMinQueueBytes = 16 * 1024;  // of one prompt, however many share the bound

// What Engine::Submit refuses, in the client's words.
Status SubmitError(Status status) {
  if (status.code() == StatusCode::kResourceExhausted && ErrorCodeOf(status).empty()) {
    return WithErrorCode(std::move(status), kOverloadedCode);
  }
  if (!PolicyKeyOf(status).empty()) return SparsityError(status);
  if (status.code() == StatusCode::kInvalidArgument && ErrorCodeOf(status).empty()) {
    return WithErrorCode(std::move(status), kContextLengthCode);
  }
  return status;
}

double MeanLogprob(const Answer& answer) {
  double sum = 0;
  for (const SampleResult& result : answer.logprobs) sum += result.logprob.logprob;
  return answer.logprobs.empty() ? 0 : sum / static_cast<double>(answer.logprobs.size());
}

// Adds one prompt's usage to the others': means are weighted by the steps that they are over.
void AddSparsity(const SparsityUsage& part, std::optional<SparsityUsage>* sum) {
  if (!*sum) {
    *sum = part;
    return;
  }
  SparsityUsage& all = **sum;
  const auto steps = static_cast<double>(all.sparse_steps + part.sparse_steps);
  const double weight = steps == 0 ? 0 : static_cast<double>(part.sparse_steps) / steps;
  const auto merge = [weight](double* mean, double other) { *mean += (other - *mean) * weight; };
  merge(&all.kept_tokens_per_head, part.kept_tokens_per_head);
  merge(&all.loaded_tokens_per_kv_head, part.loaded_tokens_per_kv_head);
  merge(&all.loaded_share, part.loaded_share);
  merge(&all.context_tokens, part.context_tokens);
  if (part.true_mass && all.true_mass) {
    merge(&*all.true_mass, *part.true_mass);
  } else if (part.true_mass) {
    all.true_mass = part.true_mass;
  }
  all.sparse_steps += part.sparse_steps;
  all.bypassed_steps += part.bypassed_steps;
}

}  // namespace

RunningGeneration::RunningGeneration(Engine& engine, PreparedGeneration prepared)
    : engine_(engine),
      prepared_(std::move(prepared)),
      answers_per_prompt_(prepared_.requests.front().n) {}

StatusOr<std::unique_ptr<RunningGeneration>> RunningGeneration::Start(
    Engine& engine, PreparedGeneration prepared, size_t max_bytes, std::function<void()> on_ready) {
  std::unique_ptr<RunningGeneration> running(new RunningGeneration(engine, std::move(prepared)));
  PreparedGeneration& p = running->prepared_;
  const size_t queue_bytes = std::max(kMinQueueBytes, max_bytes / p.requests.size());
  for (Request& request : p.requests) {
    auto queue = std::make_shared<OutputQueue>(queue_bytes, on_ready);
    running->prompt_tokens_.push_back(p.echo && p.num_logprobs >= 0 ? request.prompt
                                                                    : std::vector<int32_t>());
    auto handle = engine.Submit(std::move(request), queue);
    if (!handle.ok()) return SubmitError(handle.status());  // the destructor cancels the others
    running->queues_.push_back(std::move(queue));
    running->handles_.push_back(*handle);
  }
  return running;
}

RunningGeneration::~RunningGeneration() {
  if (num_ended_ < num_prompts()) Cancel();
}

void RunningGeneration::Cancel() {
  if (cancelled_.exchange(true)) return;
  for (const auto& queue : queues_) queue->Close();
  for (const RequestHandle handle : handles_) engine_.Cancel(handle);
}

RunningGeneration::Batch RunningGeneration::Take() {
  Batch batch;
  for (int prompt = 0; prompt < num_prompts(); ++prompt) {
    OutputQueue::Batch part = queues_[prompt]->Take();
    if (!part.prompt_logprobs.empty()) {
      batch.prompt_logprobs.push_back({prompt, std::move(part.prompt_logprobs)});
    }
    for (OutputDelta& delta : part.deltas) {
      delta.index += prompt * answers_per_prompt_;
      batch.deltas.push_back(std::move(delta));
    }
    if (part.summary) {
      summary_.prompt_tokens += part.summary->prompt_tokens;
      if (!prepared_.prompt_only) {
        summary_.completion_tokens += part.summary->completion_tokens;
      }
      summary_.cached_tokens += part.summary->cached_tokens;
      if (part.summary->sparsity) AddSparsity(*part.summary->sparsity, &summary_.sparsity);
      ++num_ended_;
    }
  }
  batch.done = num_ended_ == num_prompts();
  return batch;
}

AnswerCollector::AnswerCollector(const RunningGeneration& running)
    : num_choices_per_prompt_(running.prepared().num_choices_per_prompt),
      answers_per_prompt_(running.answers_per_prompt()),
      prompt_only_(running.prepared().prompt_only),
      num_logprobs_(running.prepared().num_logprobs),
      answers_(static_cast<size_t>(running.num_prompts()) * running.answers_per_prompt()),
      prompt_logprobs_(running.num_prompts()) {
  for (size_t i = 0; i < answers_.size(); ++i) {
    answers_[i].prompt = static_cast<int>(i) / answers_per_prompt_;
  }
}

Status AnswerCollector::Add(RunningGeneration::Batch batch) {
  for (auto& [prompt, logprobs] : batch.prompt_logprobs) {
    prompt_logprobs_[prompt] = std::move(logprobs);
  }
  for (OutputDelta& delta : batch.deltas) {
    GLOAM_RETURN_IF_ERROR(StatusOfEnd(delta));
    Answer& answer = answers_[delta.index];
    if (delta.finish_reason) {
      answer.finish_reason = prompt_only_ ? FinishReason::kLength : *delta.finish_reason;
      if (!prompt_only_) answer.stop_reason = std::move(delta.stop_reason);
    }
    if (prompt_only_) continue;
    answer.text += delta.text;
    answer.tokens.insert(answer.tokens.end(), delta.tokens.begin(), delta.tokens.end());
    answer.logprobs.insert(answer.logprobs.end(), std::make_move_iterator(delta.logprobs.begin()),
                           std::make_move_iterator(delta.logprobs.end()));
  }
  return OkStatus();
}

std::vector<Answer> AnswerCollector::TakeAnswers() {
  std::vector<Answer> chosen;
  for (size_t begin = 0; begin < answers_.size(); begin += answers_per_prompt_) {
    const auto first = answers_.begin() + static_cast<std::ptrdiff_t>(begin);
    if (num_choices_per_prompt_ < answers_per_prompt_) {
      std::stable_sort(first, first + answers_per_prompt_, [](const Answer& a, const Answer& b) {
        return MeanLogprob(a) > MeanLogprob(b);
      });
    }
    for (int i = 0; i < num_choices_per_prompt_; ++i) {
      Answer& answer = first[i];
      answer.index = static_cast<int>(chosen.size());
      if (num_logprobs_ < 0) answer.logprobs.clear();  // computed only to rank the answers
      chosen.push_back(std::move(answer));
    }
  }
  answers_.clear();
  return chosen;
}

Status StatusOfEnd(const OutputDelta& delta) {
  if (!delta.finish_reason) return OkStatus();
  if (*delta.finish_reason == FinishReason::kError) {
    return delta.error.ok() ? Internal("the request failed") : delta.error;
  }
  if (*delta.finish_reason == FinishReason::kCancelled) {
    return MakeStatus(StatusCode::kCancelled,
                      "the request was cancelled: the server is stopping, or the answer was not "
                      "read in time");
  }
  return OkStatus();
}

}  // namespace gloam
