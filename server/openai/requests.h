// OpenAI's JSON request bodies -> the API's nouns (server/api.h). Pure functions: they check shapes
// and types and leave ranges to GenerationService. Unknown fields are ignored, as in vLLM.
#pragma once

#include <string_view>

#include "base/status.h"
#include "server/api.h"

namespace gloam {

// Errors: kInvalidArgument with `param`, the path of the field at fault.
[[nodiscard]] StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body);
[[nodiscard]] StatusOr<ChatCompletionRequest> ParseChatCompletionRequest(std::string_view body);
[[nodiscard]] StatusOr<TokenizeRequest> ParseTokenizeRequest(std::string_view body);
[[nodiscard]] StatusOr<DetokenizeRequest> ParseDetokenizeRequest(std::string_view body);

}  // namespace gloam
