#include "server/sampling_limits.h"

#include <algorithm>
#include <limits>
#include <string_view>

#include "server/api_error.h"

namespace gloam {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

Status CheckInt(std::string_view field, std::optional<int64_t> value, int64_t low, int64_t high) {
  if (!value || (*value >= low && *value <= high)) return OkStatus();
  if (high == kMaxInt) {
    return InvalidField(field, "{} must be at least {}, got {}", field, low, *value);
  }
  return InvalidField(field, "{} must be between {} and {}, got {}", field, low, high, *value);
}

// Also refuses NaN. `open_low`: the range is (low, high].
Status CheckNumber(std::string_view field, std::optional<double> value, double low, double high,
                   bool open_low = false) {
  if (!value || ((open_low ? *value > low : *value >= low) && *value <= high)) return OkStatus();
  return InvalidField(field, "{} must be {} {} and at most {}, got {}", field,
                      open_low ? "greater than" : "at least", low, high, *value);
}

Status CheckStops(const GenerationParams& params, int vocab_size) {
  if (params.stop.size() > kMaxStopStrings) {
    return InvalidField("stop", "stop may hold at most {} strings, got {}", kMaxStopStrings,
                        params.stop.size());
  }
  for (const std::string& stop : params.stop) {
    if (stop.empty()) return InvalidField("stop", "stop may not hold an empty string");
    if (stop.size() > kMaxStopBytes) {
      return InvalidField("stop", "a stop string may be at most {} bytes long, got {}",
                          kMaxStopBytes, stop.size());
    }
  }
  if (params.stop_token_ids.size() > kMaxStopTokenIds) {
    return InvalidField("stop_token_ids", "stop_token_ids may hold at most {} ids, got {}",
                        kMaxStopTokenIds, params.stop_token_ids.size());
  }
  for (const int64_t id : params.stop_token_ids) {
    if (id < 0 || id >= vocab_size) {
      return InvalidField("stop_token_ids",
                          "stop_token_ids must hold token ids between 0 and {}, got {}",
                          vocab_size - 1, id);
    }
  }
  return OkStatus();
}

Status CheckLogitBias(const GenerationParams& params, int vocab_size) {
  if (params.logit_bias.size() > kMaxLogitBias) {
    return InvalidField("logit_bias", "logit_bias may hold at most {} entries, got {}",
                        kMaxLogitBias, params.logit_bias.size());
  }
  for (const auto& [id, bias] : params.logit_bias) {
    if (id < 0 || id >= vocab_size) {
      return InvalidField("logit_bias",
                          "logit_bias keys must be token ids between 0 and {}, got {}",
                          vocab_size - 1, id);
    }
    if (!(bias >= -100 && bias <= 100)) {
      return InvalidField("logit_bias", "logit_bias values must be between -100 and 100, got {}",
                          bias);
    }
  }
  return OkStatus();
}

}  // namespace

Status CheckParams(const GenerationParams& params, int vocab_size) {
  const GenerationParams& p = params;
  GLOAM_RETURN_IF_ERROR(CheckInt("n", p.n, 1, kMaxChoicesPerPrompt));
  GLOAM_RETURN_IF_ERROR(CheckInt("best_of", p.best_of, 1, kMaxChoicesPerPrompt));
  if (p.best_of && *p.best_of < p.n.value_or(1)) {
    return InvalidField("best_of", "best_of must be at least n ({}), got {}", p.n.value_or(1),
                        *p.best_of);
  }
  GLOAM_RETURN_IF_ERROR(CheckNumber("temperature", p.temperature, 0, 2));
  GLOAM_RETURN_IF_ERROR(CheckNumber("top_p", p.top_p, 0, 1, /*open_low=*/true));
  GLOAM_RETURN_IF_ERROR(CheckNumber("min_p", p.min_p, 0, 1));
  GLOAM_RETURN_IF_ERROR(CheckInt("top_k", p.top_k, -1, kMaxInt));
  GLOAM_RETURN_IF_ERROR(
      CheckNumber("repetition_penalty", p.repetition_penalty, 0, 2, /*open_low=*/true));
  GLOAM_RETURN_IF_ERROR(CheckNumber("frequency_penalty", p.frequency_penalty, -2, 2));
  GLOAM_RETURN_IF_ERROR(CheckNumber("presence_penalty", p.presence_penalty, -2, 2));
  GLOAM_RETURN_IF_ERROR(CheckInt(p.max_tokens_field, p.max_tokens, 0, kMaxInt));
  GLOAM_RETURN_IF_ERROR(CheckInt("min_tokens", p.min_tokens, 0, kMaxInt));
  if (p.min_tokens && p.max_tokens && *p.min_tokens > *p.max_tokens) {
    return InvalidField("min_tokens", "min_tokens must be at most {} ({}), got {}",
                        p.max_tokens_field, *p.max_tokens, *p.min_tokens);
  }
  GLOAM_RETURN_IF_ERROR(CheckInt(p.logprobs_field, p.num_logprobs, 0, kMaxLogprobs));
  GLOAM_RETURN_IF_ERROR(CheckInt("prompt_logprobs", p.num_prompt_logprobs, 0, kMaxLogprobs));
  if (p.priority < -kMaxInt || p.priority > kMaxInt) {
    return InvalidField("priority", "priority must be between {} and {}, got {}", -kMaxInt, kMaxInt,
                        p.priority);
  }
  GLOAM_RETURN_IF_ERROR(CheckStops(p, vocab_size));
  return CheckLogitBias(p, vocab_size);
}

SamplingParams MakeSampling(const GenerationParams& params, const GenerationDefaults& defaults) {
  const auto number = [](std::optional<double> value, std::optional<float> model_default,
                         float fallback) {
    return value ? static_cast<float>(*value) : model_default.value_or(fallback);
  };
  SamplingParams sampling;
  sampling.temperature = number(params.temperature, defaults.temperature, 1.0f);
  sampling.top_p = number(params.top_p, defaults.top_p, 1.0f);
  sampling.min_p = number(params.min_p, defaults.min_p, 0.0f);
  sampling.repetition_penalty =
      number(params.repetition_penalty, defaults.repetition_penalty, 1.0f);
  sampling.frequency_penalty = number(params.frequency_penalty, std::nullopt, 0.0f);
  sampling.presence_penalty = number(params.presence_penalty, std::nullopt, 0.0f);
  sampling.top_k = params.top_k ? std::max(0, static_cast<int>(*params.top_k))
                                : std::max(0, defaults.top_k.value_or(0));
  if (params.seed) sampling.seed = static_cast<uint64_t>(*params.seed);
  if (params.max_tokens) sampling.max_tokens = static_cast<int>(*params.max_tokens);
  sampling.min_tokens = static_cast<int>(params.min_tokens.value_or(0));
  sampling.ignore_eos = params.ignore_eos;
  sampling.stop = params.stop;
  sampling.stop_token_ids.assign(params.stop_token_ids.begin(), params.stop_token_ids.end());
  sampling.include_stop_str_in_output = params.include_stop_str_in_output;
  sampling.skip_special_tokens = params.skip_special_tokens;
  for (const auto& [id, bias] : params.logit_bias) {
    sampling.logit_bias.emplace_back(static_cast<int32_t>(id), static_cast<float>(bias));
  }
  sampling.num_logprobs = static_cast<int>(params.num_logprobs.value_or(-1));
  sampling.num_prompt_logprobs = static_cast<int>(params.num_prompt_logprobs.value_or(-1));
  return sampling;
}

}  // namespace gloam
