#include "models/tokenizer/tokenizer.h"

namespace gloam {

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  for (const int32_t id : ids) text += TokenBytes(id, skip_special);
  if (strips_leading_space() && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

}  // namespace gloam
