// JSON from a model's files: parsed strictly, and read with errors that name file and field.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"

namespace gloam {

// Parses `text`, which must be an object. Refuses bad syntax, keys that are there twice and
// nesting deeper than 64. Errors: kInvalidArgument with `file` and the byte offset.
[[nodiscard]] StatusOr<nlohmann::json> ParseJsonObject(std::string_view text,
                                                       const std::string& file);

// The same for a file. Errors also: kNotFound.
[[nodiscard]] StatusOr<nlohmann::json> ReadJsonFile(const std::filesystem::path& path);

// Typed reading of an object's fields; null counts as absent. Views the object. Errors are
// kInvalidArgument: "<file>: <prefix><field> ...".
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const std::string& file() const { return file_; }
  std::string NameOf(std::string_view field) const { return prefix_ + std::string(field); }
  const nlohmann::json* Find(std::string_view field) const;  // nullptr where absent or null
  bool Has(std::string_view field) const { return Find(field) != nullptr; }

  // Required fields.
  [[nodiscard]] Status Int(std::string_view field, int* value) const;
  [[nodiscard]] Status String(std::string_view field, std::string* value) const;

  // These leave `value` where the field is absent.
  [[nodiscard]] Status OptionalInt(std::string_view field, int* value) const;
  [[nodiscard]] Status OptionalFloat(std::string_view field, float* value) const;
  [[nodiscard]] Status OptionalBool(std::string_view field, bool* value) const;
  [[nodiscard]] Status OptionalString(std::string_view field, std::string* value) const;
  // One integer, or an array of them.
  [[nodiscard]] Status OptionalInts(std::string_view field, std::vector<int32_t>* values) const;

  [[nodiscard]] Status Error(std::string_view field, std::string_view problem) const;

 private:
  const nlohmann::json& object_;
  std::string file_;
  std::string prefix_;
};

}  // namespace gloam
