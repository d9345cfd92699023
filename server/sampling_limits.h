// The ranges of every sampling field of a request, and how a request, the model's defaults and
// OpenAI's defaults make SamplingParams. Pure functions.
#pragma once

#include "base/status.h"
#include "engine/request.h"
#include "models/model_config.h"
#include "server/api.h"

namespace gloam {

inline constexpr int kMaxChoicesPerPrompt = 128;  // n and best_of
inline constexpr int kMaxChoices = 2048;          // of all prompts together
inline constexpr int kMaxLogprobs = 20;
inline constexpr int kMaxStopStrings = 4;
inline constexpr int kMaxStopBytes = 1024;  // of one stop string
inline constexpr int kMaxStopTokenIds = 256;
inline constexpr int kMaxLogitBias = 1024;

// Errors: kInvalidArgument with `param`, stating the range.
[[nodiscard]] Status CheckParams(const GenerationParams& params, int vocab_size);

// `params` must have passed CheckParams. max_tokens is left as the request has it.
SamplingParams MakeSampling(const GenerationParams& params, const GenerationDefaults& defaults);

}  // namespace gloam
