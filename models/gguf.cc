#include "models/gguf.h"

#include <cstring>
#include <type_traits>

#include "models/field_name.h"

namespace gloam {
namespace {

template <typename T>
T Load(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

bool IsInteger(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kUint16:
    case GgufType::kInt16:
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kUint64:
    case GgufType::kInt64:
      return true;
    default:
      return false;
  }
}

size_t IntegerBytes(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
      return 4;
    default:
      return 8;
  }
}

// A uint64 over the largest int64 is given as that largest: no field takes it.
int64_t LoadInteger(GgufType type, const std::byte* data) {
  switch (type) {
    case GgufType::kUint8:
      return Load<uint8_t>(data);
    case GgufType::kInt8:
      return Load<int8_t>(data);
    case GgufType::kUint16:
      return Load<uint16_t>(data);
    case GgufType::kInt16:
      return Load<int16_t>(data);
    case GgufType::kUint32:
      return Load<uint32_t>(data);
    case GgufType::kInt32:
      return Load<int32_t>(data);
    case GgufType::kUint64: {
      const uint64_t value = Load<uint64_t>(data);
      return value > INT64_MAX ? INT64_MAX : static_cast<int64_t>(value);
    }
    default:
      return Load<int64_t>(data);
  }
}

}  // namespace

std::string_view NameOf(GgufType type) {
  static constexpr std::string_view kNames[] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                                "int32",  "float32", "bool",   "string", "array",
                                                "uint64", "int64",   "float64"};
  return kNames[static_cast<uint32_t>(type)];
}

const GgufValue* Gguf::Find(std::string_view key) const {
  const auto found = index_.find(key);
  return found == index_.end() ? nullptr : &entries_[found->second].value;
}

Status Gguf::KeyError(std::string_view key, std::string_view problem) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return InvalidArgument("{}: key {} {}", file_, QuoteName(key), problem);
  return InvalidArgument("{}: key {} {} (at byte {})", file_, QuoteName(key), problem,
                         value->offset);
}

StatusOr<const GgufValue*> Gguf::FindTyped(std::string_view key, GgufType type) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return KeyError(key, "is missing");
  if (value->type != type) {
    return KeyError(key,
                    fmt::format("is of type {}; it must be {}", NameOf(value->type), NameOf(type)));
  }
  return value;
}

StatusOr<const GgufValue*> Gguf::FindArray(std::string_view key) const {
  return FindTyped(key, GgufType::kArray);
}

StatusOr<int64_t> Gguf::GetInt(std::string_view key, int64_t min, int64_t max) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return KeyError(key, "is missing");
  if (!IsInteger(value->type)) {
    return KeyError(key, fmt::format("is of type {}; it must be an integer", NameOf(value->type)));
  }
  const int64_t number = LoadInteger(value->type, value->payload.data());
  if (number < min || number > max) {
    return KeyError(key, fmt::format("is {}; it must be in [{}, {}]", number, min, max));
  }
  return number;
}

StatusOr<float> Gguf::GetFloat(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value != nullptr && value->type == GgufType::kFloat64) {
    return static_cast<float>(Load<double>(value->payload.data()));
  }
  GLOAM_ASSIGN_OR_RETURN(value, FindTyped(key, GgufType::kFloat32));
  return Load<float>(value->payload.data());
}

StatusOr<bool> Gguf::GetBool(std::string_view key) const {
  GLOAM_ASSIGN_OR_RETURN(const GgufValue* value, FindTyped(key, GgufType::kBool));
  return value->payload[0] != std::byte{0};
}

StatusOr<std::string_view> Gguf::GetString(std::string_view key) const {
  GLOAM_ASSIGN_OR_RETURN(const GgufValue* value, FindTyped(key, GgufType::kString));
  return std::string_view(reinterpret_cast<const char*>(value->payload.data()),
                          value->payload.size());
}

StatusOr<std::vector<std::string>> Gguf::GetStrings(std::string_view key) const {
  GLOAM_ASSIGN_OR_RETURN(const GgufValue* value, FindArray(key));
  if (value->element_type != GgufType::kString) {
    return KeyError(key, fmt::format("has elements of type {}; they must be strings",
                                     NameOf(value->element_type)));
  }
  std::vector<std::string> texts;
  texts.reserve(value->count);  // each takes 8 bytes or more of the file, which the parser checked
  const std::byte* data = value->payload.data();
  for (uint64_t i = 0; i < value->count; ++i) {
    const uint64_t length = Load<uint64_t>(data);
    texts.emplace_back(reinterpret_cast<const char*>(data + sizeof(length)), length);
    data += sizeof(length) + length;
  }
  return texts;
}

StatusOr<std::vector<float>> Gguf::GetFloats(std::string_view key) const {
  GLOAM_ASSIGN_OR_RETURN(const GgufValue* value, FindArray(key));
  if (value->element_type != GgufType::kFloat32) {
    return KeyError(key, fmt::format("has elements of type {}; they must be float32",
                                     NameOf(value->element_type)));
  }
  std::vector<float> numbers(value->count);
  if (!numbers.empty()) {
    std::memcpy(numbers.data(), value->payload.data(), value->payload.size());
  }
  return numbers;
}

StatusOr<std::vector<int64_t>> Gguf::GetInts(std::string_view key, int64_t min, int64_t max) const {
  GLOAM_ASSIGN_OR_RETURN(const GgufValue* value, FindArray(key));
  if (!IsInteger(value->element_type)) {
    return KeyError(key, fmt::format("has elements of type {}; they must be integers",
                                     NameOf(value->element_type)));
  }
  std::vector<int64_t> numbers;
  numbers.reserve(value->count);
  const size_t bytes = IntegerBytes(value->element_type);
  for (uint64_t i = 0; i < value->count; ++i) {
    const int64_t number = LoadInteger(value->element_type, value->payload.data() + i * bytes);
    if (number < min || number > max) {
      return KeyError(
          key, fmt::format("has {} at index {}; it must be in [{}, {}]", number, i, min, max));
    }
    numbers.push_back(number);
  }
  return numbers;
}

StatusOr<int64_t> Gguf::GetIntOr(std::string_view key, int64_t absent, int64_t min,
                                 int64_t max) const {
  return Has(key) ? GetInt(key, min, max) : absent;
}

StatusOr<float> Gguf::GetFloatOr(std::string_view key, float absent) const {
  return Has(key) ? GetFloat(key) : absent;
}

StatusOr<bool> Gguf::GetBoolOr(std::string_view key, bool absent) const {
  return Has(key) ? GetBool(key) : absent;
}

StatusOr<std::string_view> Gguf::GetStringOr(std::string_view key, std::string_view absent) const {
  return Has(key) ? GetString(key) : absent;
}

}  // namespace gloam
