// The catalogue: models that `gloam pull NAME` and `gloam serve NAME` know by name. It is
// models/catalog.json, embedded in the program at build time. Immutable; any thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gloam {

// Where a model's file comes from.
struct CatalogSource {
  enum class Kind : uint8_t {
    kPythonPackages,  // packages that carry the file, or its pieces in order
    kHuggingFace,     // one file of a repository, always one part
  };
  struct Part {
    std::string package;  // package, or repository "owner/name"
    std::string version;  // version, or revision
    std::string file;     // path inside it
    int64_t bytes = 0;
  };
  Kind kind = Kind::kPythonPackages;
  std::vector<Part> parts;
};

struct CatalogEntry {
  std::string name;  // also the recommended name to serve it under
  std::string description;
  std::string license;
  int64_t bytes = 0;
  std::string sha256;  // of the whole file, lower-case hex
  CatalogSource source;
};

struct Catalog {
  std::string default_model;
  std::vector<CatalogEntry> models;

  // Errors: kNotFound listing the names.
  [[nodiscard]] StatusOr<const CatalogEntry*> Find(std::string_view name) const;
};

// Errors: kInvalidArgument naming the entry and field.
[[nodiscard]] StatusOr<Catalog> ParseCatalog(std::string_view json);

const Catalog& BuiltInCatalog();

// The folder of pulled models: $GLOAM_MODELS, or gloam/models below $XDG_CACHE_HOME or ~/.cache.
// Errors: kNotFound where none of these variables and no $HOME is set.
[[nodiscard]] StatusOr<std::filesystem::path> DefaultModelFolder();

// What the command line's MODEL means.
struct ResolvedModel {
  std::filesystem::path path;           // a file or a folder
  const CatalogEntry* entry = nullptr;  // the catalogue's, where MODEL is a name of it
  bool present = true;                  // false: `entry` has yet to be pulled to `path`
};

// A path that exists, else a name of the catalogue. Errors: kNotFound listing the names.
[[nodiscard]] StatusOr<ResolvedModel> ResolveModel(const std::string& model);

namespace internal {
extern const std::string_view kCatalogJson;
}

}  // namespace gloam
