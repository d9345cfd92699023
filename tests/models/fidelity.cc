#include "tests/models/fidelity.h"

#include <algorithm>
#include <cmath>
#include <fstream>

#include "base/check.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "tests/models/paged_runner.h"

namespace gloam {
namespace {

constexpr int kStepTokens = 256;  // 156 MB of logits for a vocabulary of 152k

GoldenPrompt PromptFromJson(const nlohmann::json& json) {
  GoldenPrompt prompt = {.name = json.at("name"),
                         .prompt_tokens = json.at("prompt_tokens"),
                         .token_ids = json.at("token_ids")};
  for (const nlohmann::json& row : json.at("rows")) {
    const std::vector<int32_t> top = row.at(2);
    const std::vector<double> top_logprobs = row.at(3);
    prompt.rows.push_back({.position = row.at(0),
                           .logprob = row.at(1),
                           .top_token = top.at(0),
                           .margin = top_logprobs.at(0) - top_logprobs.at(1)});
  }
  return prompt;
}

FidelityStats Compare(const GoldenRow& golden, bool in_prompt, const SampleResult& ours,
                      double noise) {
  FidelityStats stats;
  if (in_prompt) {
    const double difference = ours.logprob.logprob - golden.logprob;
    stats.num_rows = 1;
    stats.sum_difference = stats.max_difference = std::abs(difference);
    stats.sum_signed = -difference;
  }
  const bool agrees = ours.top.at(0).token == golden.top_token;
  if (!agrees) stats.max_margin_lost = golden.margin;
  if (golden.margin > noise) {
    stats.num_clear = 1;
    stats.num_disagree = agrees ? 0 : 1;
  }
  return stats;
}

// Takes the prompts one after another, in chunks that fill every step.
class FidelityRun {
 public:
  FidelityRun(Model& model, Ops& ops, DType kv_dtype, const std::vector<GoldenPrompt>& prompts,
              double noise)
      : ops_(ops),
        prompts_(prompts),
        noise_(noise),
        runner_(model, ops, kv_dtype, NumBlocks(prompts), /*seed=*/1),
        results_(prompts.size()) {}

  std::vector<FidelityStats> Run() {
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const GoldenPrompt& prompt = prompts_[i];
      const std::span<const int32_t> tokens(prompt.token_ids);
      const int sequence = runner_.AddSequence();
      for (size_t begin = 0; begin < tokens.size();) {
        const size_t count = std::min(tokens.size() - begin, size_t(kStepTokens - step_tokens_));
        AddChunk(sequence, i, begin, count);
        begin += count;
        if (step_tokens_ == kStepTokens) Step();
      }
    }
    if (step_tokens_ > 0) Step();
    return std::move(results_);
  }

 private:
  struct Row {
    size_t prompt;
    const GoldenRow* golden;
  };

  static int NumBlocks(const std::vector<GoldenPrompt>& prompts) {
    int blocks = 0;
    for (const GoldenPrompt& prompt : prompts) {
      blocks += static_cast<int>(prompt.token_ids.size() + kBlockTokens - 1) / kBlockTokens;
    }
    return blocks;
  }

  void AddChunk(int sequence, size_t prompt_index, size_t begin, size_t count) {
    const GoldenPrompt& prompt = prompts_[prompt_index];
    PagedRunner::Chunk chunk = {.sequence = sequence,
                                .tokens = std::span(prompt.token_ids).subspan(begin, count)};
    for (const GoldenRow& golden : prompt.rows) {
      const int row = golden.position - static_cast<int>(begin);
      if (row < 0 || row >= static_cast<int>(count)) continue;
      chunk.logit_rows.push_back(row);
      rows_.push_back({prompt_index, &golden});
      next_tokens_.push_back(prompt.token_ids.at(golden.position + 1));
    }
    chunks_.push_back(std::move(chunk));
    step_tokens_ += static_cast<int>(count);
  }

  void Step() {
    const TensorView logits = runner_.Step(chunks_);
    std::vector<SampleResult> ours(rows_.size());
    if (!rows_.empty()) {
      ops_.Score({.logits = logits, .tokens = next_tokens_, .num_logprobs = 1, .results = ours});
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      const auto& [prompt, golden] = rows_[i];
      const bool in_prompt = golden->position + 1 < prompts_[prompt].prompt_tokens;
      results_[prompt].Add(Compare(*golden, in_prompt, ours[i], noise_));
    }
    chunks_.clear();
    rows_.clear();
    next_tokens_.clear();
    step_tokens_ = 0;
  }

  Ops& ops_;
  const std::vector<GoldenPrompt>& prompts_;
  const double noise_;
  PagedRunner runner_;
  std::vector<FidelityStats> results_;
  // The step being filled.
  std::vector<PagedRunner::Chunk> chunks_;
  std::vector<Row> rows_;
  std::vector<int32_t> next_tokens_;
  int step_tokens_ = 0;
};

}  // namespace

StatusOr<std::vector<GoldenPrompt>> ReadLogitGoldens(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) return NotFound("{}: cannot be opened", path.string());
  std::vector<GoldenPrompt> prompts;
  try {
    const nlohmann::json goldens = nlohmann::json::parse(file);
    for (const nlohmann::json& prompt : goldens.at("prompts")) {
      prompts.push_back(PromptFromJson(prompt));
    }
  } catch (const std::exception& e) {
    return InvalidArgument("{}: {}", path.string(), e.what());
  }
  return prompts;
}

std::vector<GoldenPrompt> MakeReference(Model& model, Ops& ops, DType kv_dtype,
                                        const std::vector<std::vector<int32_t>>& texts,
                                        int num_generated) {
  size_t longest = 0;
  for (const auto& text : texts) longest = std::max(longest, text.size());
  const auto max_tokens = static_cast<int>(longest);
  GLOAM_CHECK(ReserveSteps(model, ops, kv_dtype, max_tokens, max_tokens).ok());
  PagedRunner runner(model, ops, kv_dtype, (max_tokens + num_generated) / kBlockTokens + 1,
                     /*seed=*/1);
  std::vector<GoldenPrompt> prompts;
  for (const auto& text : texts) {
    GoldenPrompt& prompt = prompts.emplace_back();
    prompt.name = fmt::format("text {}", prompts.size());
    prompt.prompt_tokens = static_cast<int>(text.size());
    prompt.token_ids = text;
    runner.Clear();
    const int sequence = runner.AddSequence();
    for (size_t begin = 0; begin < text.size() + num_generated;) {
      const std::vector<int32_t> tokens(prompt.token_ids.begin() + begin, prompt.token_ids.end());
      PagedRunner::Chunk chunk = {.sequence = sequence, .tokens = tokens};
      for (size_t i = 0; i < tokens.size(); ++i) chunk.logit_rows.push_back(static_cast<int>(i));
      // The last row's next token is not known yet: it is scored as one that is, and not kept.
      std::vector<int32_t> next(tokens.begin() + 1, tokens.end());
      next.push_back(0);
      std::vector<SampleResult> scores(tokens.size());
      ops.Score(
          {.logits = runner.Step(chunk), .tokens = next, .num_logprobs = 2, .results = scores});
      for (size_t i = 0; i < scores.size(); ++i) {
        const auto& top = scores[i].top;
        if (i + 1 == scores.size()) {
          prompt.token_ids.push_back(top.at(0).token);
          scores[i].logprob = top.at(0);
        }
        prompt.rows.push_back({.position = static_cast<int>(begin + i),
                               .logprob = scores[i].logprob.logprob,
                               .top_token = top.at(0).token,
                               .margin = top.at(0).logprob - top.at(1).logprob});
      }
      begin += tokens.size();
    }
  }
  return prompts;
}

void FidelityStats::Add(const FidelityStats& other) {
  num_rows += other.num_rows;
  sum_difference += other.sum_difference;
  sum_signed += other.sum_signed;
  max_difference = std::max(max_difference, other.max_difference);
  num_clear += other.num_clear;
  num_disagree += other.num_disagree;
  max_margin_lost = std::max(max_margin_lost, other.max_margin_lost);
}

std::vector<FidelityStats> MeasureFidelity(Model& model, Ops& ops, DType kv_dtype,
                                           const std::vector<GoldenPrompt>& prompts, double noise) {
  const Status reserved = ReserveSteps(model, ops, kv_dtype, kStepTokens, kStepTokens);
  GLOAM_CHECK(reserved.ok());
  return FidelityRun(model, ops, kv_dtype, prompts, noise).Run();
}

}  // namespace gloam
