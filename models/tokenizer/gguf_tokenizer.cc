// MakeTokenizer: a tokenizer from a GGUF file's vocabulary.
#include <algorithm>

#include "models/tokenizer/bpe_encoder.h"
#include "models/tokenizer/composite_tokenizer.h"
#include "models/tokenizer/sentencepiece_encoder.h"
#include "models/tokenizer/tokenizer_factory.h"

namespace gloam {
namespace {

Status CheckVocabulary(const GgufVocabulary& v) {
  const auto size = static_cast<int32_t>(v.tokens.size());
  if (size == 0) return InvalidArgument("tokenizer.ggml.tokens: is empty");
  if (!v.types.empty() && v.types.size() != v.tokens.size()) {
    return InvalidArgument("tokenizer.ggml.token_type: has {} entries for {} tokens",
                           v.types.size(), size);
  }
  for (size_t id = 0; id < v.types.size(); ++id) {
    // Some writers leave 0 (undefined) for padding.
    if (v.types[id] < 0 || v.types[id] > 6) {
      return InvalidArgument("tokenizer.ggml.token_type[{}]: {} is not in 0-6", id, v.types[id]);
    }
  }
  const std::pair<const char*, int32_t> ids[] = {{"bos_token_id", v.bos_id},
                                                 {"eos_token_id", v.eos_id},
                                                 {"eot_token_id", v.eot_id},
                                                 {"unknown_token_id", v.unk_id},
                                                 {"padding_token_id", v.pad_id}};
  for (const auto& [key, id] : ids) {
    if (id < -1 || id >= size) {
      return InvalidArgument("tokenizer.ggml.{}: {} is not in a vocabulary of {}", key, id, size);
    }
  }
  if (v.add_bos && v.bos_id < 0) {
    return InvalidArgument("tokenizer.ggml.add_bos_token: true without a bos_token_id");
  }
  if (v.add_eos && v.eos_id < 0) {
    return InvalidArgument("tokenizer.ggml.add_eos_token: true without an eos_token_id");
  }
  return OkStatus();
}

std::vector<TokenKind> KindsOf(const GgufVocabulary& v) {
  std::vector<TokenKind> kinds(v.tokens.size(), TokenKind::kNormal);
  for (size_t id = 0; id < v.types.size(); ++id) {
    kinds[id] = v.types[id] == 0 ? TokenKind::kUnused : static_cast<TokenKind>(v.types[id]);
  }
  return kinds;
}

std::vector<AddedToken> AddedTokensOf(const TokenTable& table) {
  std::vector<AddedToken> added;
  for (int32_t id = 0; id < table.size(); ++id) {
    const TokenKind kind = table.kind(id);
    const bool special = table.IsSpecial(id);
    if ((special || kind == TokenKind::kUserDefined) && !table.bytes(id).empty()) {
      added.push_back({.id = id, .content = std::string(table.bytes(id)), .special = special});
    }
  }
  return added;
}

// "left right" at the one space that separates them; names spell spaces otherwise.
StatusOr<std::vector<BpeEncoder::Merge>> SplitMerges(const std::vector<std::string>& lines) {
  std::vector<BpeEncoder::Merge> merges;
  merges.reserve(lines.size());
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string_view line = lines[i];
    const size_t space = line.find(' ', 1);
    if (space == std::string_view::npos || space + 1 == line.size()) {
      return InvalidArgument("tokenizer.ggml.merges[{}]: '{}' is not 'left right'", i, line);
    }
    merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  return merges;
}

StatusOr<std::unique_ptr<TextEncoder>> MakeBpe(const GgufVocabulary& v, const TokenTable& table) {
  GLOAM_ASSIGN_OR_RETURN(NamedPreTokenizer pre, MakePreTokenizer(v.pre));
  GLOAM_ASSIGN_OR_RETURN(const auto merges, SplitMerges(v.merges));
  BpeConfig config;
  config.ignore_merges = pre.ignore_merges;
  config.normalizer.nfc = pre.normalize_nfc;
  config.pre_tokenizer = std::move(pre.pre_tokenizer);
  auto encoder = BpeEncoder::Make(table, merges, std::move(config));
  if (!encoder.ok()) {
    return InvalidArgument("tokenizer.ggml.merges: {}", MessageOf(encoder.status()));
  }
  return std::move(*encoder);
}

StatusOr<std::unique_ptr<TextEncoder>> MakeSentencePiece(const GgufVocabulary& v,
                                                         const TokenTable& table) {
  if (v.scores.size() != static_cast<size_t>(table.size())) {
    return InvalidArgument("tokenizer.ggml.scores: has {} entries for {} tokens", v.scores.size(),
                           table.size());
  }
  return MakeSentencePieceEncoder(table, v.scores, v.add_space_prefix);
}

}  // namespace

StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer(GgufVocabulary vocabulary) {
  GLOAM_RETURN_IF_ERROR(CheckVocabulary(vocabulary));
  const bool is_bpe = vocabulary.model == "gpt2";
  if (!is_bpe && vocabulary.model != "llama") {
    return Unimplemented("tokenizer.ggml.model: '{}' is not supported; supported are gpt2, llama",
                         vocabulary.model);
  }
  TokenizerParts parts;
  GLOAM_ASSIGN_OR_RETURN(
      TokenTable table,
      TokenTable::Make(std::move(vocabulary.tokens), KindsOf(vocabulary),
                       is_bpe ? TokenSpelling::kByteChars : TokenSpelling::kMetaspace));
  parts.table = std::make_unique<const TokenTable>(std::move(table));
  GLOAM_ASSIGN_OR_RETURN(parts.encoder, is_bpe ? MakeBpe(vocabulary, *parts.table)
                                               : MakeSentencePiece(vocabulary, *parts.table));
  parts.added_tokens = AddedTokensOf(*parts.table);
  if (vocabulary.add_bos) parts.prefix.push_back(vocabulary.bos_id);
  if (vocabulary.add_eos) parts.suffix.push_back(vocabulary.eos_id);
  if (vocabulary.bos_id >= 0) parts.bos_id = vocabulary.bos_id;
  for (const int32_t id : {vocabulary.eos_id, vocabulary.eot_id}) {
    if (id >= 0) parts.eos_ids.push_back(id);
  }
  parts.strips_leading_space = !is_bpe && vocabulary.add_space_prefix;
  return MakeCompositeTokenizer(std::move(parts));
}

}  // namespace gloam
