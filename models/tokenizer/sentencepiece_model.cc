#include "models/tokenizer/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace gloam {
namespace {

class LibraryModel final : public SentencePieceModel {
 public:
  bool Load(std::string_view proto, std::string* error) {
    const auto status = processor_.LoadFromSerializedProto(proto);
    if (!status.ok()) *error = status.ToString();
    return status.ok();
  }

  bool Encode(std::string_view text, std::vector<int32_t>* ids, std::string* error) const override {
    std::vector<int> encoded;
    const auto status = processor_.Encode(text, &encoded);
    if (!status.ok()) *error = status.ToString();
    ids->insert(ids->end(), encoded.begin(), encoded.end());
    return status.ok();
  }

  int size() const override { return processor_.GetPieceSize(); }
  std::string PieceName(int id) const override { return processor_.IdToPiece(id); }
  int PieceKind(int id) const override {
    if (processor_.IsUnknown(id)) return 2;
    if (processor_.IsControl(id)) return 3;
    if (processor_.IsUnused(id)) return 5;
    if (processor_.IsByte(id)) return 6;
    return 1;
  }
  int bos_id() const override { return processor_.bos_id(); }
  int eos_id() const override { return processor_.eos_id(); }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

std::unique_ptr<SentencePieceModel> SentencePieceModel::Load(std::string_view proto,
                                                             std::string* error) {
  auto model = std::make_unique<LibraryModel>();
  if (!model->Load(proto, error)) return nullptr;
  return model;
}

}  // namespace gloam
