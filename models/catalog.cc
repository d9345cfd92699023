#include "models/catalog.h"

#include <algorithm>
#include <cstdlib>

#include "base/check.h"
#include "models/checked_json.h"
#include "models/field_name.h"
#include "models/mapped_file.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kFile[] = "catalog.json";

bool IsPlainName(std::string_view name) {  // safe as a file's name
  return !name.empty() && name.front() != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
  });
}

bool IsSha256(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

// A package or a version is an argument of another program: it must not look like an option.
bool IsArgument(std::string_view text) { return !text.empty() && text.front() != '-'; }

bool IsInsidePath(const std::string& file) {
  const fs::path path = file;
  return !file.empty() && path.is_relative() &&
         std::find(path.begin(), path.end(), "..") == path.end();
}

Status ReadBytes(const JsonFields& fields, int64_t* bytes) {
  const json* found = fields.Find("bytes");
  if (found == nullptr || !found->is_number_unsigned() || found->get<int64_t>() <= 0) {
    return fields.Error("bytes", "must be an integer above 0");
  }
  *bytes = found->get<int64_t>();
  return OkStatus();
}

StatusOr<CatalogSource::Part> ReadPart(const JsonFields& fields, const char* package_field,
                                       const char* version_field) {
  CatalogSource::Part part;
  GLOAM_RETURN_IF_ERROR(fields.String(package_field, &part.package));
  GLOAM_RETURN_IF_ERROR(fields.String(version_field, &part.version));
  GLOAM_RETURN_IF_ERROR(fields.String("file", &part.file));
  if (!IsArgument(part.package))
    return fields.Error(package_field, "must not be empty or start with '-'");
  if (!IsArgument(part.version))
    return fields.Error(version_field, "must not be empty or start with '-'");
  if (!IsInsidePath(part.file)) return fields.Error("file", "must be a path inside its source");
  return part;
}

StatusOr<CatalogSource> ReadSource(const json& object, const CatalogEntry& entry,
                                   const std::string& prefix) {
  const JsonFields fields(object, kFile, prefix);
  CatalogSource source;
  std::string kind;
  GLOAM_RETURN_IF_ERROR(fields.String("kind", &kind));
  if (kind == "huggingface") {
    source.kind = CatalogSource::Kind::kHuggingFace;
    GLOAM_ASSIGN_OR_RETURN(CatalogSource::Part part, ReadPart(fields, "repository", "revision"));
    part.bytes = entry.bytes;
    source.parts.push_back(std::move(part));
    return source;
  }
  if (kind != "python-packages") {
    return fields.Error("kind", "must be python-packages or huggingface");
  }
  const json* parts = fields.Find("parts");
  if (parts == nullptr || !parts->is_array()) return fields.Error("parts", "must be an array");
  int64_t total = 0;
  for (const json& item : *parts) {
    const JsonFields part_fields(item, kFile, prefix + "parts[].");
    if (!item.is_object()) return fields.Error("parts", "must hold objects");
    GLOAM_ASSIGN_OR_RETURN(CatalogSource::Part part, ReadPart(part_fields, "package", "version"));
    GLOAM_RETURN_IF_ERROR(ReadBytes(part_fields, &part.bytes));
    total += part.bytes;
    source.parts.push_back(std::move(part));
  }
  if (total != entry.bytes) {
    return fields.Error("parts", fmt::format("hold {} bytes of {}", total, entry.bytes));
  }
  return source;
}

StatusOr<CatalogEntry> ReadEntry(const json& object) {
  if (!object.is_object()) return InvalidArgument("{}: models must hold objects", kFile);
  CatalogEntry entry;
  GLOAM_RETURN_IF_ERROR(JsonFields(object, kFile, "models[].").String("name", &entry.name));
  const std::string prefix = fmt::format("models[{}].", QuoteName(entry.name));
  const JsonFields fields(object, kFile, prefix);
  if (!IsPlainName(entry.name)) {
    return fields.Error("name", "must consist of a-z, 0-9, '.', '-' and '_'");
  }
  GLOAM_RETURN_IF_ERROR(fields.String("description", &entry.description));
  GLOAM_RETURN_IF_ERROR(fields.String("license", &entry.license));
  GLOAM_RETURN_IF_ERROR(ReadBytes(fields, &entry.bytes));
  GLOAM_RETURN_IF_ERROR(fields.String("sha256", &entry.sha256));
  if (!IsSha256(entry.sha256)) return fields.Error("sha256", "must be 64 lower-case hex digits");
  const json* source = fields.Find("source");
  if (source == nullptr || !source->is_object()) return fields.Error("source", "must be an object");
  GLOAM_ASSIGN_OR_RETURN(entry.source, ReadSource(*source, entry, prefix + "source."));
  return entry;
}

// The value of an environment variable; empty where it is not set.
std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

StatusOr<const CatalogEntry*> Catalog::Find(std::string_view name) const {
  std::string names;
  for (const CatalogEntry& entry : models) {
    if (entry.name == name) return &entry;
    names += (names.empty() ? "" : ", ") + entry.name;
  }
  return NotFound("{} is neither a file, a folder nor a model of the catalogue ({})",
                  QuoteName(name), names);
}

StatusOr<Catalog> ParseCatalog(std::string_view text) {
  GLOAM_ASSIGN_OR_RETURN(const json document, ParseJsonObject(text, kFile));
  const JsonFields fields(document, kFile);
  Catalog catalog;
  GLOAM_RETURN_IF_ERROR(fields.String("default", &catalog.default_model));
  const json* models = fields.Find("models");
  if (models == nullptr || !models->is_array()) return fields.Error("models", "must be an array");
  for (const json& item : *models) {
    GLOAM_ASSIGN_OR_RETURN(CatalogEntry entry, ReadEntry(item));
    if (catalog.Find(entry.name).ok()) {
      return InvalidArgument("{}: model {} is there twice", kFile, QuoteName(entry.name));
    }
    catalog.models.push_back(std::move(entry));
  }
  if (!catalog.Find(catalog.default_model).ok()) {
    return fields.Error("default", "names none of the models");
  }
  return catalog;
}

const Catalog& BuiltInCatalog() {
  static const Catalog catalog = [] {
    StatusOr<Catalog> parsed = ParseCatalog(internal::kCatalogJson);
    GLOAM_CHECK(parsed.ok());
    return *std::move(parsed);
  }();
  return catalog;
}

StatusOr<fs::path> DefaultModelFolder() {
  if (const std::string folder = Environment("GLOAM_MODELS"); !folder.empty()) {
    return fs::path(folder);
  }
  if (const std::string cache = Environment("XDG_CACHE_HOME"); !cache.empty()) {
    return fs::path(cache) / "gloam" / "models";
  }
  if (const std::string home = Environment("HOME"); !home.empty()) {
    return fs::path(home) / ".cache" / "gloam" / "models";
  }
  return NotFound("no folder for models: set GLOAM_MODELS, XDG_CACHE_HOME or HOME");
}

StatusOr<ResolvedModel> ResolveModel(const std::string& model) {
  if (FileExists(model)) return ResolvedModel{.path = model};
  GLOAM_ASSIGN_OR_RETURN(const CatalogEntry* entry, BuiltInCatalog().Find(model));
  GLOAM_ASSIGN_OR_RETURN(const fs::path folder, DefaultModelFolder());
  ResolvedModel resolved{.path = folder / (entry->name + ".gguf"), .entry = entry};
  resolved.present = FileExists(resolved.path);
  return resolved;
}

}  // namespace gloam
