#include "models/safetensors.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "models/checked_json.h"
#include "models/field_name.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

// A byte range of the data section, [begin, end).
struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;
};

StatusOr<WeightType> ReadType(const JsonFields& fields) {
  std::string dtype;
  GLOAM_RETURN_IF_ERROR(fields.String("dtype", &dtype));
  if (dtype == "F32") return WeightType::kF32;
  if (dtype == "F16") return WeightType::kF16;
  if (dtype == "BF16") return WeightType::kBF16;
  return Unimplemented("{}: {} is {}; F32, F16 and BF16 are supported", fields.file(),
                       fields.NameOf("dtype"), QuoteName(dtype));
}

StatusOr<std::vector<uint64_t>> ReadUnsigned(const JsonFields& fields, std::string_view field) {
  const json* list = fields.Find(field);
  std::vector<uint64_t> numbers;
  if (list == nullptr || !list->is_array()) return fields.Error(field, "must be an array");
  for (const json& item : *list) {
    if (!item.is_number_unsigned()) {
      return fields.Error(field, "must hold integers of 0 or more");
    }
    numbers.push_back(item.get<uint64_t>());
  }
  return numbers;
}

// Reads one entry of the header; its offset stays relative to the data section.
StatusOr<SafetensorsTensor> ReadTensor(const std::string& name, const json& entry,
                                       const std::string& file, Range* range) {
  const std::string field = fmt::format("tensor {}", QuoteName(name));
  if (!entry.is_object()) return InvalidArgument("{}: {} must be an object", file, field);
  const JsonFields fields(entry, file, field + ": ");
  SafetensorsTensor tensor{.name = name};
  GLOAM_ASSIGN_OR_RETURN(tensor.type, ReadType(fields));
  GLOAM_ASSIGN_OR_RETURN(const std::vector<uint64_t> shape, ReadUnsigned(fields, "shape"));
  int64_t num_bytes = InfoOf(tensor.type).block_bytes;
  for (const uint64_t dim : shape) {
    if (__builtin_mul_overflow(num_bytes, dim, &num_bytes)) {
      return fields.Error("shape", "overflows 63 bits");
    }
    tensor.shape.push_back(static_cast<int64_t>(dim));
  }
  GLOAM_ASSIGN_OR_RETURN(const std::vector<uint64_t> offsets, ReadUnsigned(fields, "data_offsets"));
  if (offsets.size() != 2) return fields.Error("data_offsets", "must be [begin, end]");
  *range = {offsets[0], offsets[1]};
  if (range->end < range->begin) {
    return fields.Error("data_offsets",
                        fmt::format("[{}, {}] run backwards", range->begin, range->end));
  }
  if (range->end - range->begin != static_cast<uint64_t>(num_bytes)) {
    return fields.Error("data_offsets",
                        fmt::format("[{}, {}] span {} bytes; shape and dtype need {}", range->begin,
                                    range->end, range->end - range->begin, num_bytes));
  }
  return tensor;
}

}  // namespace

StatusOr<Safetensors> Safetensors::Parse(std::span<const std::byte> bytes, std::string file) {
  uint64_t header_bytes = 0;
  if (bytes.size() < kLengthBytes) {
    return InvalidArgument(
        "{}: header length: the file is truncated: 8 bytes are needed and {} "
        "are left (at byte 0)",
        file, bytes.size());
  }
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  if (header_bytes < 2 || header_bytes > kMaxHeaderBytes) {
    return InvalidArgument("{}: header length: {} is not in [2, {}] (at byte 0)", file,
                           header_bytes, kMaxHeaderBytes);
  }
  if (header_bytes > bytes.size() - kLengthBytes) {
    return InvalidArgument("{}: header length: {} is beyond the end of the file (at byte 0)", file,
                           header_bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                              header_bytes);
  GLOAM_ASSIGN_OR_RETURN(const json header, ParseJsonObject(text, file + ": header"));

  const uint64_t data_start = kLengthBytes + header_bytes;
  const uint64_t data_bytes = bytes.size() - data_start;
  Safetensors result;
  std::vector<std::pair<Range, SafetensorsTensor>> found;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    Range range;
    GLOAM_ASSIGN_OR_RETURN(SafetensorsTensor tensor, ReadTensor(name, entry, file, &range));
    found.emplace_back(range, std::move(tensor));
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::tie(a.first.begin, a.first.end) < std::tie(b.first.begin, b.first.end);
  });
  uint64_t covered = 0;
  for (auto& [range, tensor] : found) {
    const std::string field = fmt::format("tensor {}", QuoteName(tensor.name));
    if (range.begin != covered) {
      return InvalidArgument(
          "{}: {}: its data {} (at byte {})", file, field,
          range.begin < covered ? "overlaps the tensor before it" : "leaves a hole before it",
          data_start + std::min(range.begin, data_bytes));
    }
    if (range.end > data_bytes) {
      return InvalidArgument(
          "{}: {}: its data ends {} bytes into the tensor data, of which the "
          "file holds {} (at byte {})",
          file, field, range.end, data_bytes, data_start);
    }
    tensor.offset = data_start + range.begin;
    tensor.data = bytes.subspan(tensor.offset, range.end - range.begin);
    covered = range.end;
    result.tensors_.push_back(std::move(tensor));
  }
  if (covered != data_bytes) {
    return InvalidArgument("{}: {} bytes follow the last tensor's data (at byte {})", file,
                           data_bytes - covered, data_start + covered);
  }
  for (const SafetensorsTensor& tensor : result.tensors_) {
    if (tensor.offset % InfoOf(tensor.type).block_bytes == 0) continue;
    return Unimplemented("{}: tensor {}: its data is not aligned to its elements (at byte {})",
                         file, QuoteName(tensor.name), tensor.offset);
  }
  return result;
}

}  // namespace gloam
