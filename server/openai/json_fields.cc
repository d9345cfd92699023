#include "server/openai/json_fields.h"

#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "server/api_error.h"

namespace gloam {

using json = nlohmann::ordered_json;

std::optional<int64_t> AsInteger(const json& value) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(kMax)) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    // Beyond 2^53 a double no longer says which integer was meant.
    if (std::abs(number) <= 9007199254740992.0 && std::floor(number) == number) {
      return static_cast<int64_t>(number);
    }
  }
  return std::nullopt;
}

JsonFields::JsonFields(const json& object, std::string prefix)
    : object_(object), prefix_(std::move(prefix)) {
  GLOAM_CHECK(object.is_object());
}

const json* JsonFields::Find(std::string_view name) {
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

void JsonFields::Fail(Status status) {
  if (status_.ok()) status_ = std::move(status);
}

void JsonFields::FailType(std::string_view name, std::string_view wanted) {
  const std::string path = PathOf(name);
  Fail(InvalidField(path, "{} must be {}", path, wanted));
}

void JsonFields::Read(std::string_view name, std::optional<int64_t>* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  const auto number = AsInteger(*value);
  if (!number) return FailType(name, "an integer");
  *out = *number;
}

void JsonFields::Read(std::string_view name, std::optional<double>* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_number()) return FailType(name, "a number");
  *out = value->get<double>();
}

void JsonFields::Read(std::string_view name, std::optional<std::string>* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_string()) return FailType(name, "a string");
  *out = value->get_ref<const std::string&>();
}

void JsonFields::Read(std::string_view name, int64_t* out) {
  std::optional<int64_t> value;
  Read(name, &value);
  if (value) *out = *value;
}

void JsonFields::Read(std::string_view name, bool* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_boolean()) return FailType(name, "a boolean");
  *out = value->get<bool>();
}

void JsonFields::Read(std::string_view name, std::string* out) {
  std::optional<std::string> value;
  Read(name, &value);
  if (value) *out = std::move(*value);
}

void JsonFields::Read(std::string_view name, std::vector<int64_t>* out) {
  const json* value = Find(name);
  if (value == nullptr) return;
  if (!value->is_array()) return FailType(name, "an array of integers");
  for (const json& element : *value) {
    const auto number = AsInteger(element);
    if (!number) return FailType(name, "an array of integers");
    out->push_back(*number);
  }
}

}  // namespace gloam
