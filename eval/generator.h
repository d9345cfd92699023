// TextGenerator: what answers the items of a benchmark: a model in this process, or a server behind
// a URL (server/cli/eval.cc makes both).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/request.h"
#include "eval/policy_set.h"
#include "eval/prompt.h"
#include "nlohmann/json.hpp"

namespace gloam {

struct GenerateRequest {
  std::vector<int32_t> prompt;
  int num_decoded_prompt_tokens = 0;  // of the prompt's last tokens, computed as decode steps are
  int max_tokens = 0;
  int min_tokens = 0;
  std::vector<int32_t> stop_token_ids;
  nlohmann::json policy;  // a policy's body; null: dense
};

struct GeneratedText {
  std::string text;
  int num_tokens = 0;
  std::optional<SparsityUsage> sparsity;  // of requests with a policy
};

class TextGenerator {
 public:
  virtual ~TextGenerator() = default;

  virtual PromptTokenizer& tokenizer() = 0;
  virtual std::string model_name() const = 0;
  virtual int max_model_len() const = 0;
  // What beside the model's name results depend on, as far as it is known: types, versions.
  virtual nlohmann::json settings() const = 0;

  // The likeliest answer (greedy). Any thread; several calls at a time. Errors: the engine's or the
  // server's, in one line.
  [[nodiscard]] virtual StatusOr<GeneratedText> Generate(const GenerateRequest& request) = 0;
};

}  // namespace gloam
