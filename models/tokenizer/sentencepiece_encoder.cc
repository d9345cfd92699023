#include "models/tokenizer/sentencepiece_encoder.h"

#include "models/tokenizer/sentencepiece_proto.h"

namespace gloam {
namespace {

class SentencePieceEncoder final : public TextEncoder {
 public:
  // `inner` encodes pieces that do not begin the prompt; null: the same as `first`.
  SentencePieceEncoder(std::unique_ptr<SentencePieceModel> first,
                       std::unique_ptr<SentencePieceModel> inner)
      : first_(std::move(first)), inner_(std::move(inner)) {}

  Status Encode(std::string_view text, bool at_start, std::vector<int32_t>* ids) const override {
    const SentencePieceModel& model = at_start || inner_ == nullptr ? *first_ : *inner_;
    std::string error;
    if (!model.Encode(text, ids, &error)) return Internal("SentencePiece: {}", error);
    return OkStatus();
  }

 private:
  std::unique_ptr<SentencePieceModel> first_, inner_;
};

StatusOr<std::unique_ptr<SentencePieceModel>> Load(std::string_view proto) {
  std::string error;
  auto model = SentencePieceModel::Load(proto, &error);
  if (model == nullptr) return InvalidArgument("SentencePiece refuses the vocabulary: {}", error);
  return model;
}

}  // namespace

StatusOr<std::unique_ptr<TextEncoder>> MakeSentencePieceEncoder(const TokenTable& table,
                                                                const std::vector<float>& scores,
                                                                bool add_space_prefix) {
  return MakeSentencePieceEncoder(MakeSentencePieceProto(table, scores, add_space_prefix),
                                  PrefixRule::kEveryPiece);
}

StatusOr<std::unique_ptr<TextEncoder>> MakeSentencePieceEncoder(std::string_view proto,
                                                                PrefixRule prefix_rule) {
  if (prefix_rule == PrefixRule::kNever) {
    GLOAM_ASSIGN_OR_RETURN(auto model, Load(WithoutDummyPrefix(proto)));
    return std::make_unique<SentencePieceEncoder>(std::move(model), nullptr);
  }
  GLOAM_ASSIGN_OR_RETURN(auto first, Load(proto));
  std::unique_ptr<SentencePieceModel> inner;
  if (prefix_rule == PrefixRule::kFirstPiece && AddsDummyPrefix(proto)) {
    GLOAM_ASSIGN_OR_RETURN(inner, Load(WithoutDummyPrefix(proto)));
  }
  return std::make_unique<SentencePieceEncoder>(std::move(first), std::move(inner));
}

}  // namespace gloam
