#include "models/model_file.h"

#include <algorithm>
#include <system_error>

#include "models/field_name.h"
#include "models/gguf_model_file.h"
#include "models/hf_model_file.h"

namespace gloam {

StatusOr<std::unique_ptr<ModelFile>> ModelFile::Open(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return OpenHfModel(path);
  if (path.extension() == ".safetensors") {
    return InvalidArgument("{}: give the folder that holds this file and its config.json",
                           path.string());
  }
  if (IsPickleFile(path)) {
    return InvalidArgument(
        "{}: pickle files are refused, they can run code; convert the weights to "
        "safetensors or GGUF",
        path.string());
  }
  return OpenGgufModel(path);
}

StatusOr<TensorInfo> ModelFile::Find(std::string_view name) const {
  for (const TensorInfo& tensor : tensors()) {
    if (tensor.name == name) return tensor;
  }
  return NotFound("{}: no tensor {}", path(), QuoteName(name));
}

bool ModelFile::Has(std::string_view name) const {
  return std::any_of(tensors().begin(), tensors().end(),
                     [name](const TensorInfo& tensor) { return tensor.name == name; });
}

}  // namespace gloam
