// LoadModel: from a path to a model that runs. A new family is one row of kFamilies; see
// docs/add_model.md.
#include <string_view>
#include <vector>

#include "fmt/ranges.h"
#include "models/llama.h"
#include "models/model.h"
#include "models/model_file.h"

namespace gloam {
namespace {

struct Family {
  std::string_view architecture;  // ModelConfig::architecture
  StatusOr<std::unique_ptr<Model>> (*load)(const ModelFile& file, Ops& ops,
                                           const LoadOptions& options);
};

constexpr Family kFamilies[] = {
    {"llama", Llama::Load},    // Llama 2 and 3, TinyLlama, SmolLM2
    {"mistral", Llama::Load},  // sliding window
    {"qwen2", Llama::Load},    // and 2.5: biases on Q, K and V
    {"qwen3", Llama::Load},    // norm of Q and K per head
    {"smollm3", Llama::Load},  // layers without rope
};

StatusOr<const Family*> FindFamily(const ModelFile& file) {
  std::vector<std::string_view> known;
  for (const Family& family : kFamilies) {
    if (family.architecture == file.config().architecture) return &family;
    known.push_back(family.architecture);
  }
  return Unimplemented("{}: architecture '{}' is not supported; supported are {}", file.path(),
                       file.config().architecture, fmt::join(known, ", "));
}

}  // namespace

StatusOr<LoadedModel> LoadModel(const std::filesystem::path& path, Ops& ops,
                                const LoadOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<ModelFile> file, ModelFile::Open(path));
  GLOAM_ASSIGN_OR_RETURN(const Family* family, FindFamily(*file));
  LoadedModel loaded;
  GLOAM_ASSIGN_OR_RETURN(loaded.tokenizer, file->LoadTokenizer());
  const int vocab_size = file->config().vocab_size;
  if (loaded.tokenizer->vocab_size() > vocab_size) {
    return InvalidArgument("{}: the tokenizer has {} tokens, the model only {}", file->path(),
                           loaded.tokenizer->vocab_size(), vocab_size);
  }
  GLOAM_ASSIGN_OR_RETURN(loaded.model, family->load(*file, ops, options));
  loaded.generation_defaults = file->generation_defaults();
  loaded.chat_template = file->chat_template();
  return loaded;
}

}  // namespace gloam
