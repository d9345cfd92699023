// TextEncoder: plain text, without special tokens, to token ids. One implementation for each
// family of vocabularies. Immutable; any thread.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gloam {

class TextEncoder {
 public:
  virtual ~TextEncoder() = default;

  // Appends the ids of `text` (valid UTF-8, not empty). `at_start`: the prompt begins with it.
  // Errors: kResourceExhausted when a limit on the text's shape is hit.
  [[nodiscard]] virtual Status Encode(std::string_view text, bool at_start,
                                      std::vector<int32_t>* ids) const = 0;
};

}  // namespace gloam
