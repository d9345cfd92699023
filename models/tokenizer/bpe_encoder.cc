#include "models/tokenizer/bpe_encoder.h"

#include "models/tokenizer/unicode.h"
#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

// A word this long is one run of one class of characters, and would hold gigabytes to merge.
constexpr size_t kMaxWordBytes = size_t{64} << 20;

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  while (true) {
    const size_t found = text.find(from);
    out.append(text.substr(0, found));
    if (found == std::string_view::npos) return out;
    out.append(to);
    text.remove_prefix(found + from.size());
  }
}

}  // namespace

std::string TextRewrite::Run(std::string_view text, bool at_start) const {
  std::string out = nfc ? NormalizeNfc(text) : std::string(text);
  const bool wanted = prefix_rule == PrefixRule::kEveryPiece ||
                      (prefix_rule == PrefixRule::kFirstPiece && at_start);
  if (wanted && !(prefix_unless_present && out.starts_with(prefix))) out.insert(0, prefix);
  for (const Replacement& r : replacements) out = ReplaceAll(out, r.from, r.to);
  return out;
}

struct BpeEncoder::Workspace {
  RegexMatcher matcher;
  BpeMerger::Scratch scratch;
  std::vector<PreTokenizer::Word> words;
  std::vector<int32_t> symbols;
};

BpeEncoder::BpeEncoder(const TokenTable& table, BpeConfig config)
    : table_(table),
      config_(std::move(config)),
      normalized_tokens_(std::move(config_.normalized_tokens)) {
  byte_ids_.fill(-1);
  ids_by_text_.reserve(table.size());
  // User-defined tokens come second: merges may build them, but never in place of a normal token.
  for (const TokenKind kind : {TokenKind::kNormal, TokenKind::kUserDefined}) {
    for (int32_t id = 0; id < table.size(); ++id) {
      if (table.kind(id) != kind) continue;
      ids_by_text_.try_emplace(config_.byte_level ? table.bytes(id) : table.name(id), id);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (config_.byte_level) {
      const char text = static_cast<char>(byte);
      const auto it = ids_by_text_.find(std::string_view(&text, 1));
      if (it != ids_by_text_.end()) byte_ids_[byte] = it->second;
    } else if (config_.byte_fallback) {
      byte_ids_[byte] = table.Find(fmt::format("<0x{:02X}>", byte)).value_or(-1);
    }
  }
}

StatusOr<std::unique_ptr<BpeEncoder>> BpeEncoder::Make(const TokenTable& table,
                                                       const std::vector<Merge>& merges,
                                                       BpeConfig config) {
  std::unique_ptr<BpeEncoder> encoder(new BpeEncoder(table, std::move(config)));
  GLOAM_RETURN_IF_ERROR(encoder->AddMerges(merges));
  return encoder;
}

Status BpeEncoder::AddMerges(const std::vector<Merge>& merges) {
  merger_.Reserve(merges.size());
  std::string joined;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left_name, right_name] = merges[rank];
    const auto text_of = [&](std::string_view name) {
      return config_.byte_level ? BytesFromByteChars(name) : std::string(name);
    };
    const std::string left = text_of(left_name), right = text_of(right_name);
    joined = left + right;
    const auto left_it = ids_by_text_.find(left);
    const auto right_it = ids_by_text_.find(right);
    const auto joined_it = ids_by_text_.find(joined);
    if (left_it == ids_by_text_.end() || right_it == ids_by_text_.end() ||
        joined_it == ids_by_text_.end()) {
      return InvalidArgument("merge {} ('{}' + '{}') names a token that the vocabulary lacks", rank,
                             left_name, right_name);
    }
    merger_.Add(left_it->second, right_it->second, joined_it->second, static_cast<uint32_t>(rank));
  }
  return OkStatus();
}

Status BpeEncoder::Encode(std::string_view text, bool at_start, std::vector<int32_t>* ids) const {
  const std::string normalized = config_.normalizer.Run(text, at_start);
  Workspace workspace;
  for (const AddedTokens::Piece& piece : normalized_tokens_.Split(normalized, {})) {
    if (piece.id >= 0) {
      ids->push_back(piece.id);
      continue;
    }
    const auto plain = std::string_view(normalized).substr(piece.begin, piece.end - piece.begin);
    GLOAM_RETURN_IF_ERROR(EncodePiece(plain, at_start && piece.begin == 0, &workspace, ids));
  }
  return OkStatus();
}

Status BpeEncoder::EncodePiece(std::string_view piece, bool at_start, Workspace* workspace,
                               std::vector<int32_t>* ids) const {
  const std::string text = config_.piece_rewrite.Run(piece, at_start);
  GLOAM_RETURN_IF_ERROR(config_.pre_tokenizer.Run(text, workspace->matcher, &workspace->words));
  auto& symbols = workspace->symbols;
  for (const PreTokenizer::Word& span : workspace->words) {
    const auto word = std::string_view(text).substr(span.begin, span.end - span.begin);
    if (word.size() > kMaxWordBytes) {
      return ResourceExhausted("a word of {} bytes is too long to tokenise (at most {})",
                               word.size(), kMaxWordBytes);
    }
    if (config_.ignore_merges) {
      const auto it = ids_by_text_.find(word);
      if (it != ids_by_text_.end()) {
        ids->push_back(it->second);
        continue;
      }
    }
    symbols.clear();
    AppendSymbols(word, &symbols);
    merger_.Run(&symbols, &workspace->scratch);
    ids->insert(ids->end(), symbols.begin(), symbols.end());
  }
  return OkStatus();
}

void BpeEncoder::AppendSymbols(std::string_view word, std::vector<int32_t>* symbols) const {
  if (config_.byte_level) {
    for (size_t i = 0; i < word.size(); ++i) {
      const int32_t id = byte_ids_[static_cast<uint8_t>(word[i])];
      if (id >= 0) {
        symbols->push_back(id);
      } else {
        AppendUnknown(word.substr(i, 1), symbols);
      }
    }
    return;
  }
  while (!word.empty()) {
    const std::string_view character = word.substr(0, DecodeUtf8(word).length);
    const auto it = ids_by_text_.find(character);
    if (it != ids_by_text_.end()) {
      symbols->push_back(it->second);
    } else {
      AppendUnknown(character, symbols);
    }
    word.remove_prefix(character.size());
  }
}

void BpeEncoder::AppendUnknown(std::string_view character, std::vector<int32_t>* symbols) const {
  if (config_.byte_fallback) {
    const size_t before = symbols->size();
    for (const char byte : character) {
      const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
      if (id < 0) break;
      symbols->push_back(id);
    }
    if (symbols->size() == before + character.size()) return;
    symbols->resize(before);
  }
  if (config_.unknown_id < 0) return;
  const bool fused =
      config_.fuse_unknown && !symbols->empty() && symbols->back() == config_.unknown_id;
  if (!fused) symbols->push_back(config_.unknown_id);
}

}  // namespace gloam
