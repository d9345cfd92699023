// Gguf: the metadata and tensor table of a GGUF file (versions 2 and 3, little-endian), read in
// place. Nothing in the file is trusted: every count, length, type and offset is checked before it
// is used, and memory stays in proportion to the file's size. Views the bytes, which must outlive
// it. Immutable after parsing; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "kernels/weight.h"

namespace gloam {

// Types of metadata values, with the file's numbers.
enum class GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

std::string_view NameOf(GgufType type);

// One metadata value as it lies in the file.
struct GgufValue {
  GgufType type = GgufType::kUint8;
  GgufType element_type = GgufType::kUint8;  // of an array
  uint64_t count = 1;                        // elements of an array
  uint64_t offset = 0;                       // of the payload: after type, array header or length
  std::span<const std::byte> payload;        // scalar, string's bytes, or an array's elements
};

struct GgufEntry {
  std::string_view key;
  GgufValue value;
};

struct GgufTensor {
  std::string_view name;
  std::vector<int64_t> shape;  // outermost first (the file stores the innermost first)
  WeightType type = WeightType::kF32;
  uint64_t offset = 0;  // in the file
  std::span<const std::byte> data;
};

class Gguf {
 public:
  // `file` names the bytes in errors. Errors are one line with file, field and byte offset:
  // kInvalidArgument (malformed), kUnimplemented (a tensor type that Gloam lacks).
  [[nodiscard]] static StatusOr<Gguf> Parse(std::span<const std::byte> bytes, std::string file);

  const std::string& file() const { return file_; }
  uint32_t version() const { return version_; }
  const std::vector<GgufEntry>& entries() const { return entries_; }   // in file order
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in file order

  bool Has(std::string_view key) const { return Find(key) != nullptr; }

  // Values by key. Errors: kInvalidArgument naming file, key and, where the key exists, the offset
  // and what is wrong: missing, of another type, or outside [min, max] (NaN is outside of any).
  [[nodiscard]] StatusOr<int64_t> GetInt(std::string_view key, int64_t min, int64_t max) const;
  [[nodiscard]] StatusOr<float> GetFloat(std::string_view key) const;
  [[nodiscard]] StatusOr<bool> GetBool(std::string_view key) const;
  [[nodiscard]] StatusOr<std::string_view> GetString(std::string_view key) const;
  [[nodiscard]] StatusOr<std::vector<std::string>> GetStrings(std::string_view key) const;
  [[nodiscard]] StatusOr<std::vector<float>> GetFloats(std::string_view key) const;
  // An array of integers, every element in [min, max].
  [[nodiscard]] StatusOr<std::vector<int64_t>> GetInts(std::string_view key, int64_t min,
                                                       int64_t max) const;

  // The same with a value for a key that is absent.
  [[nodiscard]] StatusOr<int64_t> GetIntOr(std::string_view key, int64_t absent, int64_t min,
                                           int64_t max) const;
  [[nodiscard]] StatusOr<float> GetFloatOr(std::string_view key, float absent) const;
  [[nodiscard]] StatusOr<bool> GetBoolOr(std::string_view key, bool absent) const;
  [[nodiscard]] StatusOr<std::string_view> GetStringOr(std::string_view key,
                                                       std::string_view absent) const;

  // "file: key 'k' ..." with the value's offset: for errors in what a value means.
  [[nodiscard]] Status KeyError(std::string_view key, std::string_view problem) const;

 private:
  class Parser;

  const GgufValue* Find(std::string_view key) const;
  StatusOr<const GgufValue*> FindTyped(std::string_view key, GgufType type) const;
  StatusOr<const GgufValue*> FindArray(std::string_view key) const;

  std::string file_;
  uint32_t version_ = 0;
  std::vector<GgufEntry> entries_;
  std::unordered_map<std::string_view, size_t> index_;  // key -> position in entries_
  std::vector<GgufTensor> tensors_;
};

}  // namespace gloam
