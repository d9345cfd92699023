// Gguf::Parse: the layout of the file. What the values mean to their readers is in gguf.cc.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <unordered_set>

#include "models/field_name.h"
#include "models/gguf.h"

namespace gloam {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF values are read in place");

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kDefaultAlignment = 32;
constexpr int kMaxArrayDepth = 4;         // real files nest none
constexpr uint64_t kMaxKeyBytes = 65535;  // both limits are the format's own
constexpr uint64_t kMaxTensorNameBytes = 64;
constexpr uint32_t kMaxDims = 4;

// Bytes of the shortest possible key-value pair (length, one byte of key, type, one byte of value)
// and tensor entry (length, one byte of name, dimension count, one dimension, type, offset): no
// count larger than the rest of the file over these can be true.
constexpr uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;

// Bytes of a scalar, or the fewest bytes that a string (its length) or an array (its header) takes.
// 0 for a number that is no type.
uint64_t MinBytes(uint32_t type) {
  static constexpr uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return type < std::size(kBytes) ? kBytes[type] : 0;
}

struct TensorType {
  const char* name;
  bool supported;
  WeightType type;
};

// ggml's numbers. Those without a name were never assigned or have been removed.
TensorType TensorTypeOf(uint32_t number) {
  switch (number) {
    case 0:
      return {"F32", true, WeightType::kF32};
    case 1:
      return {"F16", true, WeightType::kF16};
    case 2:
      return {"Q4_0", true, WeightType::kQ4_0};
    case 3:
      return {"Q4_1", true, WeightType::kQ4_1};
    case 6:
      return {"Q5_0", true, WeightType::kQ5_0};
    case 7:
      return {"Q5_1", true, WeightType::kQ5_1};
    case 8:
      return {"Q8_0", true, WeightType::kQ8_0};
    case 12:
      return {"Q4_K", true, WeightType::kQ4_K};
    case 13:
      return {"Q5_K", true, WeightType::kQ5_K};
    case 14:
      return {"Q6_K", true, WeightType::kQ6_K};
    case 30:
      return {"BF16", true, WeightType::kBF16};
    default:
      break;
  }
  static constexpr const char* kOthers[] = {
      nullptr,   nullptr,  nullptr,   nullptr, nullptr,  nullptr, nullptr, nullptr,
      nullptr,   "Q8_1",   "Q2_K",    "Q3_K",  nullptr,  nullptr, nullptr, "Q8_K",
      "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
      "I8",      "I16",    "I32",     "I64",   "F64",    "IQ1_M", nullptr, nullptr,
      nullptr,   nullptr,  "TQ1_0",   "TQ2_0", nullptr,  nullptr, nullptr, "MXFP4"};
  const char* name = number < std::size(kOthers) ? kOthers[number] : nullptr;
  return {name, false, WeightType::kF32};
}

}  // namespace

// A cursor over the file. Every read says what it reads, for the error.
class Gguf::Parser {
 public:
  Parser(std::span<const std::byte> bytes, Gguf* out) : bytes_(bytes), out_(out) {}

  Status Run() {
    uint32_t magic = 0;
    GLOAM_RETURN_IF_ERROR(Read("magic", &magic));
    if (magic != kMagic) return Error("magic", 0, "not a GGUF file (it must start with 'GGUF')");
    uint64_t offset = position_;
    GLOAM_RETURN_IF_ERROR(Read("version", &out_->version_));
    if (out_->version_ != 0 && (out_->version_ & 0xffff) == 0) {
      return Error("version", offset, "the file is big-endian; only little-endian is supported");
    }
    if (out_->version_ != 2 && out_->version_ != 3) {
      return Error("version", offset,
                   fmt::format("{} is not supported (2 and 3 are)", out_->version_));
    }
    uint64_t num_tensors = 0, num_entries = 0;
    offset = position_;
    GLOAM_RETURN_IF_ERROR(Read("tensor count", &num_tensors));
    GLOAM_RETURN_IF_ERROR(CheckCount("tensor count", offset, num_tensors, kMinTensorBytes));
    offset = position_;
    GLOAM_RETURN_IF_ERROR(Read("metadata count", &num_entries));
    GLOAM_RETURN_IF_ERROR(CheckCount("metadata count", offset, num_entries, kMinEntryBytes));

    for (uint64_t i = 0; i < num_entries; ++i) GLOAM_RETURN_IF_ERROR(ReadEntry(i));
    uint64_t alignment = kDefaultAlignment;
    GLOAM_RETURN_IF_ERROR(ReadAlignment(&alignment));
    for (uint64_t i = 0; i < num_tensors; ++i) GLOAM_RETURN_IF_ERROR(ReadTensor(i, alignment));
    return PlaceTensors(alignment);
  }

 private:
  uint64_t remaining() const { return bytes_.size() - position_; }

  Status Error(std::string_view field, uint64_t offset, std::string_view problem) const {
    return InvalidArgument("{}: {}: {} (at byte {})", out_->file_, field, problem, offset);
  }

  Status Truncated(std::string_view field, uint64_t needed) const {
    return Error(field, position_,
                 fmt::format("the file is truncated: {} bytes are needed and {} are left", needed,
                             remaining()));
  }

  template <typename T>
  Status Read(std::string_view field, T* value) {
    if (remaining() < sizeof(T)) return Truncated(field, sizeof(T));
    std::memcpy(value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return OkStatus();
  }

  Status CheckCount(std::string_view field, uint64_t offset, uint64_t count,
                    uint64_t min_bytes) const {
    if (count <= remaining() / min_bytes) return OkStatus();
    return Error(field, offset, fmt::format("{} is more than the file can hold", count));
  }

  // A length and that many bytes.
  Status ReadString(std::string_view field, uint64_t max_bytes, std::string_view* text) {
    const uint64_t offset = position_;
    uint64_t length = 0;
    GLOAM_RETURN_IF_ERROR(Read(field, &length));
    if (length > remaining()) {
      return Error(field, offset, fmt::format("length {} is beyond the end of the file", length));
    }
    if (length > max_bytes) {
      return Error(field, offset,
                   fmt::format("length {} is over the format's limit of {}", length, max_bytes));
    }
    *text = {reinterpret_cast<const char*>(bytes_.data() + position_), length};
    position_ += length;
    return OkStatus();
  }

  Status ReadType(std::string_view field, GgufType* type) {
    const uint64_t offset = position_;
    uint32_t number = 0;
    GLOAM_RETURN_IF_ERROR(Read(field, &number));
    if (MinBytes(number) == 0) {
      return Error(field, offset, fmt::format("{} is not a value type (0 to 12 are)", number));
    }
    *type = static_cast<GgufType>(number);
    return OkStatus();
  }

  Status ReadEntry(uint64_t i) {
    const uint64_t offset = position_;
    GgufEntry entry;
    const std::string ordinal = fmt::format("metadata key {}", i);
    GLOAM_RETURN_IF_ERROR(ReadString(ordinal, kMaxKeyBytes, &entry.key));
    if (entry.key.empty()) return Error(ordinal, offset, "the key is empty");
    const std::string field = fmt::format("key {}", QuoteName(entry.key));
    if (!out_->index_.emplace(entry.key, out_->entries_.size()).second) {
      return Error(field, offset, "the key is there twice");
    }
    GLOAM_RETURN_IF_ERROR(ReadType(field, &entry.value.type));
    GLOAM_RETURN_IF_ERROR(ReadValue(field, /*depth=*/0, &entry.value));
    out_->entries_.push_back(std::move(entry));
    return OkStatus();
  }

  // Reads what follows the type; value->type is set.
  Status ReadValue(const std::string& field, int depth, GgufValue* value) {
    if (value->type == GgufType::kArray) return ReadArray(field, depth, value);
    if (value->type == GgufType::kString) {
      std::string_view text;
      GLOAM_RETURN_IF_ERROR(ReadString(field, bytes_.size(), &text));
      value->offset = position_ - text.size();
      value->payload = bytes_.subspan(value->offset, text.size());
      return OkStatus();
    }
    value->offset = position_;
    const uint64_t size = MinBytes(static_cast<uint32_t>(value->type));
    if (remaining() < size) return Truncated(field, size);
    value->payload = bytes_.subspan(position_, size);
    position_ += size;
    if (value->type == GgufType::kBool) return CheckBools(field, *value);
    return OkStatus();
  }

  Status ReadArray(const std::string& field, int depth, GgufValue* value) {
    if (depth == kMaxArrayDepth) {
      return Error(field, position_, fmt::format("arrays nest deeper than {}", kMaxArrayDepth));
    }
    GLOAM_RETURN_IF_ERROR(ReadType(field, &value->element_type));
    const uint64_t offset = position_;
    GLOAM_RETURN_IF_ERROR(Read(field, &value->count));
    const uint64_t min_bytes = MinBytes(static_cast<uint32_t>(value->element_type));
    if (value->count > remaining() / min_bytes) {
      return Error(field, offset,
                   fmt::format("{} elements are more than the file can hold", value->count));
    }
    value->offset = position_;
    if (value->element_type == GgufType::kString || value->element_type == GgufType::kArray) {
      for (uint64_t i = 0; i < value->count; ++i) {
        GgufValue element{.type = value->element_type};
        GLOAM_RETURN_IF_ERROR(ReadValue(field, depth + 1, &element));
      }
    } else {
      position_ += value->count * min_bytes;
    }
    value->payload = bytes_.subspan(value->offset, position_ - value->offset);
    if (value->element_type == GgufType::kBool) return CheckBools(field, *value);
    return OkStatus();
  }

  Status CheckBools(const std::string& field, const GgufValue& value) const {
    for (size_t i = 0; i < value.payload.size(); ++i) {
      if (static_cast<uint8_t>(value.payload[i]) > 1) {
        return Error(field, value.offset + i, "a bool must be 0 or 1");
      }
    }
    return OkStatus();
  }

  Status ReadAlignment(uint64_t* alignment) const {
    constexpr std::string_view kKey = "general.alignment";
    if (!out_->Has(kKey)) return OkStatus();
    GLOAM_ASSIGN_OR_RETURN(const int64_t value,
                           out_->GetInt(kKey, 8, std::numeric_limits<int32_t>::max()));
    *alignment = static_cast<uint64_t>(value);
    if (!std::has_single_bit(*alignment)) {
      return out_->KeyError(kKey, fmt::format("is {}; it must be a power of two", value));
    }
    return OkStatus();
  }

  // Reads an entry of the tensor table. Its offset stays relative until PlaceTensors.
  Status ReadTensor(uint64_t i, uint64_t alignment) {
    uint64_t offset = position_;
    GgufTensor tensor;
    const std::string ordinal = fmt::format("name of tensor {}", i);
    GLOAM_RETURN_IF_ERROR(ReadString(ordinal, kMaxTensorNameBytes, &tensor.name));
    if (tensor.name.empty()) return Error(ordinal, offset, "the name is empty");
    const std::string field = fmt::format("tensor {}", QuoteName(tensor.name));
    if (!names_.insert(tensor.name).second) {
      return Error(field, offset, "the tensor is there twice");
    }
    GLOAM_RETURN_IF_ERROR(ReadShape(field, &tensor));
    GLOAM_RETURN_IF_ERROR(ReadTensorType(field, &tensor));
    offset = position_;
    GLOAM_RETURN_IF_ERROR(Read(field, &tensor.offset));
    if (tensor.offset % alignment != 0) {
      return Error(
          field, offset,
          fmt::format("offset {} is not a multiple of the alignment {}", tensor.offset, alignment));
    }
    out_->tensors_.push_back(std::move(tensor));
    return OkStatus();
  }

  Status ReadShape(const std::string& field, GgufTensor* tensor) {
    const uint64_t offset = position_;
    uint32_t num_dims = 0;
    GLOAM_RETURN_IF_ERROR(Read(field, &num_dims));
    if (num_dims < 1 || num_dims > kMaxDims) {
      return Error(field, offset,
                   fmt::format("{} dimensions; 1 to {} are possible", num_dims, kMaxDims));
    }
    int64_t elements = 1;
    for (uint32_t d = 0; d < num_dims; ++d) {
      const uint64_t dim_offset = position_;
      int64_t dim = 0;
      GLOAM_RETURN_IF_ERROR(Read(field, &dim));
      if (dim < 1) {
        return Error(field, dim_offset,
                     fmt::format("dimension {} is {}; it must be 1 or more", d, dim));
      }
      if (__builtin_mul_overflow(elements, dim, &elements)) {
        return Error(field, dim_offset, "the number of elements overflows 63 bits");
      }
      tensor->shape.insert(tensor->shape.begin(), dim);
    }
    return OkStatus();
  }

  Status ReadTensorType(const std::string& field, GgufTensor* tensor) {
    const uint64_t offset = position_;
    uint32_t number = 0;
    GLOAM_RETURN_IF_ERROR(Read(field, &number));
    const TensorType type = TensorTypeOf(number);
    if (type.name == nullptr) {
      return Error(field, offset, fmt::format("{} is not a tensor type", number));
    }
    if (!type.supported) {
      return Unimplemented(
          "{}: {}: type {} is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, "
          "Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are) (at byte {})",
          out_->file_, field, type.name, offset);
    }
    tensor->type = type.type;
    const int block = InfoOf(type.type).block_elements;
    if (tensor->shape.back() % block != 0) {
      return Error(field, offset,
                   fmt::format("rows of {} elements do not split into {}'s blocks "
                               "of {}",
                               tensor->shape.back(), type.name, block));
    }
    return OkStatus();
  }

  // Turns the tensors' offsets into spans of the file, and refuses those outside it or over
  // another.
  Status PlaceTensors(uint64_t alignment) {
    const uint64_t data_start = (position_ + alignment - 1) / alignment * alignment;
    for (GgufTensor& tensor : out_->tensors_) {
      const std::string field = fmt::format("tensor {}", QuoteName(tensor.name));
      const int64_t cols = tensor.shape.back();
      int64_t rows = 1, num_bytes = 0;
      for (size_t d = 0; d + 1 < tensor.shape.size(); ++d) rows *= tensor.shape[d];
      const WeightTypeInfo& info = InfoOf(tensor.type);
      if (__builtin_mul_overflow(cols / info.block_elements * rows, info.block_bytes, &num_bytes)) {
        return Error(field, data_start, "the number of bytes overflows 63 bits");
      }
      const uint64_t size = static_cast<uint64_t>(num_bytes);
      if (data_start > bytes_.size() || tensor.offset > bytes_.size() - data_start ||
          size > bytes_.size() - data_start - tensor.offset) {
        return Error(field, data_start,
                     fmt::format("its data, {} bytes from {} past the start of the tensor data, is "
                                 "beyond the end of the file ({} bytes)",
                                 size, tensor.offset, bytes_.size()));
      }
      tensor.offset += data_start;
      tensor.data = bytes_.subspan(tensor.offset, size);
    }
    std::vector<const GgufTensor*> order;
    for (const GgufTensor& tensor : out_->tensors_) order.push_back(&tensor);
    std::sort(order.begin(), order.end(),
              [](const GgufTensor* a, const GgufTensor* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
      if (order[i]->offset < order[i - 1]->offset + order[i - 1]->data.size()) {
        return Error(fmt::format("tensor {}", QuoteName(order[i]->name)), order[i]->offset,
                     fmt::format("its data overlaps that of {}", QuoteName(order[i - 1]->name)));
      }
    }
    return OkStatus();
  }

  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
  Gguf* out_;
  std::unordered_set<std::string_view> names_;
};

StatusOr<Gguf> Gguf::Parse(std::span<const std::byte> bytes, std::string file) {
  Gguf gguf;
  gguf.file_ = std::move(file);
  GLOAM_RETURN_IF_ERROR(Parser(bytes, &gguf).Run());
  return gguf;
}

}  // namespace gloam
