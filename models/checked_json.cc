#include "models/checked_json.h"

#include <limits>
#include <unordered_set>

#include "models/field_name.h"
#include "models/mapped_file.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;

// Walks a document without building it, and stops at the first fault.
class JsonChecker final : public nlohmann::json_sax<json> {
 public:
  explicit JsonChecker(std::string_view text) : text_(text) {}
  const std::string& problem() const { return problem_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }

  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& key) override {
    if (keys_.back().insert(key).second) return true;
    problem_ = fmt::format("the key {} is there twice", QuoteName(key));
    return false;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    const size_t offset = position > 0 ? position - 1 : 0;
    problem_ = offset >= text_.size()
                   ? fmt::format("the JSON ends too early (at byte {})", text_.size())
                   : fmt::format("not valid JSON (at byte {})", offset);
    return false;
  }

 private:
  bool Open() {
    keys_.emplace_back();
    if (keys_.size() <= kMaxDepth) return true;
    problem_ = fmt::format("the JSON nests deeper than {}", kMaxDepth);
    return false;
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }

  std::string_view text_;
  std::string problem_;
  std::vector<std::unordered_set<std::string>> keys_;  // of the objects (and arrays) now open
};

}  // namespace

StatusOr<json> ParseJsonObject(std::string_view text, const std::string& file) {
  JsonChecker checker(text);
  if (!json::sax_parse(text, &checker)) {
    return InvalidArgument("{}: {}", file, checker.problem());
  }
  json document = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!document.is_object()) return InvalidArgument("{}: not a JSON object (at byte 0)", file);
  return document;
}

StatusOr<json> ReadJsonFile(const std::filesystem::path& path) {
  GLOAM_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  return ParseJsonObject(text, path.string());
}

const json* JsonFields::Find(std::string_view field) const {
  const auto found = object_.find(std::string(field));
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

Status JsonFields::Error(std::string_view field, std::string_view problem) const {
  return InvalidArgument("{}: {} {}", file_, NameOf(field), problem);
}

Status JsonFields::Int(std::string_view field, int* value) const {
  if (!Has(field)) return Error(field, "is missing");
  return OptionalInt(field, value);
}

Status JsonFields::String(std::string_view field, std::string* value) const {
  if (!Has(field)) return Error(field, "is missing");
  return OptionalString(field, value);
}

Status JsonFields::OptionalInt(std::string_view field, int* value) const {
  const json* found = Find(field);
  if (found == nullptr) return OkStatus();
  // A negative integer is never unsigned here; a large one is.
  if (!found->is_number_unsigned() ||
      found->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int>::max())) {
    return Error(field,
                 fmt::format("must be an integer in [0, {}]", std::numeric_limits<int>::max()));
  }
  *value = found->get<int>();
  return OkStatus();
}

Status JsonFields::OptionalFloat(std::string_view field, float* value) const {
  const json* found = Find(field);
  if (found == nullptr) return OkStatus();
  if (!found->is_number()) return Error(field, "must be a number");
  const double number = found->get<double>();
  if (!(number >= -std::numeric_limits<float>::max() &&
        number <= std::numeric_limits<float>::max())) {
    return Error(field, "must be a finite number of float32's range");
  }
  *value = static_cast<float>(number);
  return OkStatus();
}

Status JsonFields::OptionalBool(std::string_view field, bool* value) const {
  const json* found = Find(field);
  if (found == nullptr) return OkStatus();
  if (!found->is_boolean()) return Error(field, "must be true or false");
  *value = found->get<bool>();
  return OkStatus();
}

Status JsonFields::OptionalString(std::string_view field, std::string* value) const {
  const json* found = Find(field);
  if (found == nullptr) return OkStatus();
  if (!found->is_string()) return Error(field, "must be a string");
  *value = found->get<std::string>();
  return OkStatus();
}

Status JsonFields::OptionalInts(std::string_view field, std::vector<int32_t>* values) const {
  const json* found = Find(field);
  if (found == nullptr) return OkStatus();
  const json list = found->is_array() ? *found : json::array({*found});
  values->clear();
  for (const json& item : list) {
    if (!item.is_number_unsigned() ||
        item.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int32_t>::max())) {
      return Error(
          field, fmt::format("must hold integers in [0, {}]", std::numeric_limits<int32_t>::max()));
    }
    values->push_back(item.get<int32_t>());
  }
  return OkStatus();
}

}  // namespace gloam
