// SentencePieceModel: the SentencePiece library behind plain types. It lives in a shared library of
// its own, because libsentencepiece exports a Protobuf older than the one that gRPC brings (linked
// into one program they would be mixed) and its header clashes with Abseil's.
// Immutable after loading; any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gloam {

class SentencePieceModel {
 public:
  virtual ~SentencePieceModel() = default;

  // `proto`: a serialized ModelProto, the contents of tokenizer.model. Null with `error` set when
  // the library refuses it.
  [[gnu::visibility("default")]] static std::unique_ptr<SentencePieceModel> Load(
      std::string_view proto, std::string* error);

  // Appends the ids of `text` (valid UTF-8). False with `error` set when the library fails.
  [[nodiscard]] virtual bool Encode(std::string_view text, std::vector<int32_t>* ids,
                                    std::string* error) const = 0;

  // The vocabulary. A kind is one of TokenKind's numbers; user-defined pieces count as normal.
  virtual int size() const = 0;
  virtual std::string PieceName(int id) const = 0;
  virtual int PieceKind(int id) const = 0;
  virtual int bos_id() const = 0;  // -1: none
  virtual int eos_id() const = 0;
};

}  // namespace gloam
