#include "server/cli/text_files.h"

#include <fstream>
#include <sstream>

namespace gloam {

StatusOr<std::vector<int32_t>> TokenizeFiles(const std::vector<std::string>& files,
                                             const Tokenizer& tokenizer, size_t max_tokens) {
  std::vector<int32_t> tokens;
  for (const std::string& name : files) {
    std::ifstream file(name, std::ios::binary);
    std::ostringstream text;
    if (!file || !(text << file.rdbuf())) return NotFound("cannot read {}", name);
    const std::string content = text.str();
    const TextPart part = {.text = content};
    GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> more,
                           tokenizer.Encode({&part, 1}, /*add_special=*/false));
    tokens.insert(tokens.end(), more.begin(), more.end());
    if (tokens.size() >= max_tokens) break;
  }
  if (tokens.size() > max_tokens) tokens.resize(max_tokens);
  return tokens;
}

}  // namespace gloam
