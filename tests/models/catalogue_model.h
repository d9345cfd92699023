// Where tests and benches find the catalogue's models: $GLOAM_MODELS, or the folder that
// `gloam pull` fills by default.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace gloam {

// May not exist: a test skips then.
inline std::filesystem::path CatalogueModelPath(const std::string& name) {
  const char* folder = std::getenv("GLOAM_MODELS");
  const char* home = std::getenv("HOME");
  const std::filesystem::path models =
      folder != nullptr
          ? std::filesystem::path(folder)
          : std::filesystem::path(home != nullptr ? home : ".") / ".cache/gloam/models";
  return models / (name + ".gguf");
}

}  // namespace gloam
