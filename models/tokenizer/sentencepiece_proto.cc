#include "models/tokenizer/sentencepiece_proto.h"

#include <cstring>
#include <optional>

namespace gloam {
namespace {

enum Field : uint32_t {
  kModelPieces = 1,
  kModelTrainerSpec = 2,
  kModelNormalizerSpec = 3,
  kPieceName = 1,
  kPieceScore = 2,
  kPieceType = 3,
  kTrainerModelType = 3,
  kTrainerVocabSize = 4,
  kTrainerByteFallback = 35,
  kNormalizerName = 1,
  kNormalizerDummyPrefix = 3,
  kNormalizerRemoveExtraSpace = 4,
};
enum Wire : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
constexpr uint64_t kModelTypeBpe = 2;

class Writer {
 public:
  void Varint(uint32_t field, uint64_t value) {
    Tag(field, kVarint);
    Raw(value);
  }
  void Bytes(uint32_t field, std::string_view bytes) {
    Tag(field, kBytes);
    Raw(bytes.size());
    out_.append(bytes);
  }
  void Float(uint32_t field, float value) {
    Tag(field, kFixed32);
    char bytes[4];
    std::memcpy(bytes, &value, 4);
    out_.append(bytes, 4);
  }
  const std::string& str() const { return out_; }

 private:
  void Tag(uint32_t field, Wire wire) { Raw((uint64_t{field} << 3) | wire); }
  void Raw(uint64_t value) {
    for (; value >= 0x80; value >>= 7) out_ += static_cast<char>(value | 0x80);
    out_ += static_cast<char>(value);
  }
  std::string out_;
};

// One field of a message: a number, or the bytes of a string or message.
struct FieldValue {
  uint32_t field = 0;
  uint64_t number = 0;
  std::string_view bytes;
};

std::optional<uint64_t> ReadVarint(std::string_view* in) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64 && !in->empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(in->front());
    in->remove_prefix(1);
    value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return value;
  }
  return std::nullopt;
}

// Takes the next field off `in`; nothing at the end or where the bytes are no message.
std::optional<FieldValue> ReadField(std::string_view* in) {
  const auto tag = ReadVarint(in);
  if (!tag) return std::nullopt;
  FieldValue value{.field = static_cast<uint32_t>(*tag >> 3)};
  switch (*tag & 7) {
    case kVarint: {
      const auto number = ReadVarint(in);
      if (!number) return std::nullopt;
      value.number = *number;
      return value;
    }
    case kBytes: {
      const auto size = ReadVarint(in);
      if (!size || *size > in->size()) return std::nullopt;
      value.bytes = in->substr(0, *size);
      in->remove_prefix(*size);
      return value;
    }
    case kFixed32:
    case kFixed64: {
      const size_t size = (*tag & 7) == kFixed32 ? 4 : 8;
      if (in->size() < size) return std::nullopt;
      in->remove_prefix(size);
      return value;
    }
    default:
      return std::nullopt;
  }
}

}  // namespace

std::string MakeSentencePieceProto(const TokenTable& table, const std::vector<float>& scores,
                                   bool add_dummy_prefix) {
  Writer model;
  for (int32_t id = 0; id < table.size(); ++id) {
    // The library must not find user-defined tokens itself: our AddedTokens does, and the text
    // after one starts afresh. Nor does it take empty names, which padding may have.
    const TokenKind kind =
        table.kind(id) == TokenKind::kUserDefined ? TokenKind::kControl : table.kind(id);
    const bool padding = kind == TokenKind::kUnused;
    Writer piece;
    piece.Bytes(kPieceName, padding ? fmt::format("[unused {}]", id) : table.name(id));
    piece.Float(kPieceScore, scores[id]);
    piece.Varint(kPieceType, static_cast<uint64_t>(kind));
    model.Bytes(kModelPieces, piece.str());
  }
  Writer trainer;
  trainer.Varint(kTrainerModelType, kModelTypeBpe);
  trainer.Varint(kTrainerVocabSize, table.size());
  trainer.Varint(kTrainerByteFallback, 1);
  model.Bytes(kModelTrainerSpec, trainer.str());
  Writer normalizer;
  normalizer.Bytes(kNormalizerName, "identity");
  normalizer.Varint(kNormalizerDummyPrefix, add_dummy_prefix);
  normalizer.Varint(kNormalizerRemoveExtraSpace, 0);
  model.Bytes(kModelNormalizerSpec, normalizer.str());
  return model.str();
}

bool AddsDummyPrefix(std::string_view proto) {
  bool adds = true;
  while (const auto field = ReadField(&proto)) {
    if (field->field != kModelNormalizerSpec) continue;
    std::string_view spec = field->bytes;
    while (const auto inner = ReadField(&spec)) {
      if (inner->field == kNormalizerDummyPrefix) adds = inner->number != 0;
    }
  }
  return adds;
}

std::string WithoutDummyPrefix(std::string_view proto) {
  // A message that occurs twice is merged, and the later value of a field holds.
  Writer normalizer, model;
  normalizer.Varint(kNormalizerDummyPrefix, 0);
  model.Bytes(kModelNormalizerSpec, normalizer.str());
  return std::string(proto) + model.str();
}

}  // namespace gloam
