// JsonFields: reads the fields of one JSON object by name and type. The first fault is kept and
// everything after it does nothing, so that a codec reads as a list of fields.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "nlohmann/json.hpp"

namespace gloam {

class JsonFields {
 public:
  // `object` must be a JSON object and outlive this. `prefix` leads every field's path in errors:
  // "" or "messages[2].".
  explicit JsonFields(const nlohmann::ordered_json& object, std::string prefix = "");

  // The field's value; null where it is absent or null.
  const nlohmann::ordered_json* Find(std::string_view name);

  // Each leaves `out` alone where the field is absent or null, and fails where its type is wrong.
  void Read(std::string_view name, std::optional<int64_t>* out);
  void Read(std::string_view name, std::optional<double>* out);
  void Read(std::string_view name, std::optional<std::string>* out);
  void Read(std::string_view name, int64_t* out);
  void Read(std::string_view name, bool* out);
  void Read(std::string_view name, std::string* out);
  void Read(std::string_view name, std::vector<int64_t>* out);

  std::string PathOf(std::string_view name) const { return prefix_ + std::string(name); }
  void Fail(Status status);  // kept unless something failed before
  void FailType(std::string_view name, std::string_view wanted);
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

 private:
  const nlohmann::ordered_json& object_;
  std::string prefix_;
  Status status_;
};

// An integer value, also written as 5.0; empty for everything else.
std::optional<int64_t> AsInteger(const nlohmann::ordered_json& value);

}  // namespace gloam
