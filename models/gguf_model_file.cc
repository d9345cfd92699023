#include "models/gguf_model_file.h"

#include <optional>
#include <utility>

#include "models/config_checks.h"
#include "models/mapped_file.h"

namespace gloam {
namespace {

class GgufModelFile final : public ModelFile {
 public:
  explicit GgufModelFile(Gguf gguf) : gguf_(std::move(gguf)) {}

  Status Init() {
    GLOAM_ASSIGN_OR_RETURN(config_, ReadGgufConfig(gguf_));
    for (const GgufTensor& tensor : gguf_.tensors()) {
      if (tensor.name == "rope_freqs.weight") continue;  // is in config_.rope_scaling
      const int64_t cols = tensor.shape.back();
      int64_t rows = 1;
      for (size_t d = 0; d + 1 < tensor.shape.size(); ++d) rows *= tensor.shape[d];
      tensors_.push_back({.name = std::string(tensor.name),
                          .shape = tensor.shape,
                          .data = {tensor.data.data(), tensor.type, rows, cols}});
    }
    GLOAM_RETURN_IF_ERROR(CheckTensors(config_, tensors_, gguf_.file()));
    GLOAM_ASSIGN_OR_RETURN(const std::string_view chat_template,
                           gguf_.GetStringOr("tokenizer.chat_template", ""));
    chat_template_ = std::string(chat_template);
    return OkStatus();
  }

  void Keep(MappedFile mapping) { mapping_.emplace(std::move(mapping)); }

  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return generation_defaults_; }
  const std::string& chat_template() const override { return chat_template_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  std::string path() const override { return gguf_.file(); }

  StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer() const override {
    GLOAM_ASSIGN_OR_RETURN(GgufVocabulary vocabulary, ReadGgufVocabulary(gguf_));
    auto tokenizer = MakeTokenizer(std::move(vocabulary));
    if (!tokenizer.ok()) {
      return Status(tokenizer.status().code(),
                    fmt::format("{}: {}", path(), MessageOf(tokenizer.status())));
    }
    return tokenizer;
  }

 private:
  std::optional<MappedFile> mapping_;  // absent over bytes of the caller's
  Gguf gguf_;
  ModelConfig config_;
  GenerationDefaults generation_defaults_;  // the tokenizer knows the end-of-text ids
  std::string chat_template_;
  std::vector<TensorInfo> tensors_;
};

StatusOr<std::unique_ptr<GgufModelFile>> Parse(std::span<const std::byte> bytes, std::string file) {
  GLOAM_ASSIGN_OR_RETURN(Gguf gguf, Gguf::Parse(bytes, std::move(file)));
  auto model = std::make_unique<GgufModelFile>(std::move(gguf));
  GLOAM_RETURN_IF_ERROR(model->Init());
  return model;
}

}  // namespace

StatusOr<std::unique_ptr<ModelFile>> OpenGgufModel(const std::filesystem::path& path) {
  GLOAM_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(path));
  GLOAM_ASSIGN_OR_RETURN(auto model, Parse(mapping.bytes(), path.string()));
  model->Keep(std::move(mapping));
  return model;
}

StatusOr<std::unique_ptr<ModelFile>> ParseGgufModel(std::span<const std::byte> bytes,
                                                    std::string file) {
  return Parse(bytes, std::move(file));
}

}  // namespace gloam
