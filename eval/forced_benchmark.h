// `gloam eval ppl` and `gloam eval kl`: perplexity, and divergence from dense, of long texts under
// teacher forcing. Both are measured in one pass; they differ in what comes first in the report.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "eval/forced_decoder.h"
#include "eval/runner.h"
#include "models/tokenizer/tokenizer.h"

namespace gloam {

// A model that decoders can be made of. Implemented by ForcedModel (eval/forced_model.h).
class ForcedBackend {
 public:
  virtual ~ForcedBackend() = default;

  virtual const Tokenizer& tokenizer() const = 0;
  virtual std::string model_name() const = 0;
  virtual nlohmann::json settings() const = 0;

  // Null for a null body. Errors: kInvalidArgument naming the key.
  [[nodiscard]] virtual StatusOr<std::shared_ptr<const SparsityPolicy>> Parse(
      const nlohmann::json& body) = 0;

  // A decoder of contexts of `context` tokens, of `decoded` more, under these policies. One at a
  // time. Errors: kInvalidArgument, kResourceExhausted.
  [[nodiscard]] virtual StatusOr<std::unique_ptr<ForcedDecoder>> MakeDecoder(
      int context, int decoded, RowPolicies policies) = 0;
};

struct ForcedOptions {
  std::string benchmark = "kl";              // or "ppl"
  std::vector<std::filesystem::path> texts;  // each is a group of the report
  int context = 4096;                        // tokens, a multiple of 16
  int decoded = 256;                         // tokens that are scored after each context
  int stride = 0;   // tokens from the start of a window to the next one's; 0: no overlap
  int windows = 0;  // per text at most; 0: all
};

// Windows of a text: the first starts at token 0, each has its context, the tokens that are fed and
// one more, which the last fed one is scored on. `prefix` counts as context.
std::vector<int64_t> WindowStarts(int64_t num_tokens, int num_prefix, const ForcedOptions& options);

// Every window under every policy, side by side; then the controls with the budgets measured.
// Returns the table. Errors: kNotFound (a text), kInvalidArgument (a text too short, options).
[[nodiscard]] StatusOr<std::string> RunForcedBenchmark(ForcedBackend& backend,
                                                       const ForcedOptions& options,
                                                       const std::vector<EvalPolicy>& policies,
                                                       const RunOptions& run);

}  // namespace gloam
