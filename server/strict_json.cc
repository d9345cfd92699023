#include "server/strict_json.h"

#include <cmath>
#include <cstddef>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

using json = nlohmann::ordered_json;

// Builds the document while it checks what nlohmann's own DOM parser accepts.
class StrictBuilder {
 public:
  bool null() { return Add(nullptr); }
  bool boolean(bool value) { return Add(value); }
  bool number_integer(json::number_integer_t value) { return Add(value); }
  bool number_unsigned(json::number_unsigned_t value) { return Add(value); }
  bool number_float(json::number_float_t value, const json::string_t&) {
    if (!std::isfinite(value)) return Fail("a number is out of range");
    return Add(value);
  }
  bool string(json::string_t& value) {
    if (value.find('\0') != std::string::npos) return Fail("a string holds a NUL character");
    return Add(std::move(value));
  }
  bool binary(json::binary_t&) { return Fail("binary values are not JSON"); }

  bool start_object(std::size_t) {
    keys_.emplace_back();
    return Open(json::object());
  }
  bool start_array(std::size_t) { return Open(json::array()); }
  bool end_object() {
    keys_.pop_back();
    return Close();
  }
  bool end_array() { return Close(); }

  bool key(json::string_t& name) {
    if (name.find('\0') != std::string::npos) return Fail("a key holds a NUL character");
    if (!keys_.back().insert(name).second) return Fail("an object holds the same key twice");
    key_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const json::exception& error) {
    // 406: a number that does not fit; everything else is syntax or UTF-8.
    return Fail(fmt::format(
        "{} at byte {}", error.id == 406 ? "a number is out of range" : "invalid JSON", position));
  }

  json TakeRoot() { return std::move(root_); }
  const std::string& error() const { return error_; }

 private:
  bool Fail(std::string error) {
    if (error_.empty()) error_ = std::move(error);
    return false;
  }

  json* Place(json&& value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    // Known to be new, so that ordered_map's search for it can be left out: a client's object may
    // have a million keys.
    auto& members = parent.get_ref<json::object_t&>();
    members.json::object_t::Container::emplace_back(std::move(key_), std::move(value));
    return &members.back().second;
  }

  bool Add(json&& value) {
    Place(std::move(value));
    return true;
  }

  bool Open(json&& container) {
    if (stack_.size() >= kMaxJsonDepth) {
      return Fail(fmt::format("values are nested deeper than {} levels", kMaxJsonDepth));
    }
    stack_.push_back(Place(std::move(container)));
    return true;
  }

  bool Close() {
    stack_.pop_back();
    return true;
  }

  json root_;
  std::vector<json*> stack_;  // a parent is not touched while a child is open, so these stay valid
  std::vector<std::unordered_set<std::string>> keys_;  // of the open objects
  std::string key_;
  std::string error_;
};

}  // namespace

StatusOr<json> ParseStrictJson(std::string_view text) {
  // The lexer would take it for the end of the text.
  if (text.find('\0') != text.npos) {
    return InvalidArgument("The request body is not valid JSON: it holds a NUL character");
  }
  // The parser takes a NUL for the end of its input.
  if (text.find('\0') != std::string_view::npos) {
    return InvalidArgument("The request body is not valid JSON: it holds a NUL byte");
  }
  StrictBuilder builder;
  if (!json::sax_parse(text.begin(), text.end(), &builder, json::input_format_t::json,
                       /*strict=*/true)) {
    return InvalidArgument("The request body is not valid JSON: {}", builder.error());
  }
  return builder.TakeRoot();
}

void AppendJsonString(std::string_view text, std::string* out) {
  static constexpr char kHex[] = "0123456789abcdef";
  out->push_back('"');
  size_t plain = 0;  // start of the run that is copied as it is
  size_t i = 0;
  const auto flush = [&] { out->append(text.substr(plain, i - plain)); };
  while (i < text.size()) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c >= 0x20 && c < 0x80 && c != '"' && c != '\\') {
      ++i;
      continue;
    }
    if (c >= 0x80) {
      const Utf8Char decoded = DecodeUtf8(text.substr(i));
      if (decoded.state == Utf8State::kValid) {
        i += decoded.length;
        continue;
      }
      flush();
      out->append(kReplacementUtf8);
      i += decoded.length - 1;
    } else {
      flush();
      switch (c) {
        case '"':
          out->append("\\\"");
          break;
        case '\\':
          out->append("\\\\");
          break;
        case '\n':
          out->append("\\n");
          break;
        case '\r':
          out->append("\\r");
          break;
        case '\t':
          out->append("\\t");
          break;
        default:
          out->append("\\u00");
          out->push_back(kHex[c >> 4]);
          out->push_back(kHex[c & 15]);
      }
    }
    plain = ++i;
  }
  flush();
  out->push_back('"');
}

std::string DumpJson(const nlohmann::json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
}

}  // namespace gloam
