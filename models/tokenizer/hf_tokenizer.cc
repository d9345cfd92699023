// LoadTokenizerFolder: a tokenizer from the files of a Hugging Face folder.
#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>

#include "models/checked_json.h"
#include "models/tokenizer/hf_tokenizer_json.h"
#include "models/tokenizer/sentencepiece_encoder.h"
#include "models/tokenizer/sentencepiece_proto.h"
#include "models/tokenizer/tokenizer_factory.h"

namespace gloam {
namespace {

using nlohmann::json;

// What tokenizer_config.json says; defaults where there is none.
struct HfConfig {
  std::string bos_token, eos_token;
  std::optional<bool> add_bos_token, add_eos_token;
  bool legacy = true;  // transformers' default: every piece of text gets the dummy prefix
  std::vector<HfAddedToken> added_tokens;
};

// "<s>", or {"content": "<s>", ...}.
Status ReadTokenName(const JsonFields& fields, std::string_view field, std::string* name) {
  const json* value = fields.Find(field);
  if (value == nullptr || !value->is_object()) return fields.OptionalString(field, name);
  return JsonFields(*value, fields.file(), fields.NameOf(field) + ".").String("content", name);
}

Status ReadFlag(const JsonFields& fields, std::string_view field, std::optional<bool>* flag) {
  if (!fields.Has(field)) return OkStatus();
  bool value = false;
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool(field, &value));
  *flag = value;
  return OkStatus();
}

// {"32000": {"content": ...}, ...}
Status ReadAddedTokensDecoder(const JsonFields& fields, std::vector<HfAddedToken>* tokens) {
  constexpr std::string_view kField = "added_tokens_decoder";
  const json* map = fields.Find(kField);
  if (map == nullptr) return OkStatus();
  if (!map->is_object()) return fields.Error(kField, "must be an object");
  for (const auto& [key, value] : map->items()) {
    HfAddedToken added;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), added.token.id);
    if (error != std::errc() || end != key.data() + key.size() || added.token.id < 0 ||
        !value.is_object()) {
      return fields.Error(kField, "must map ids to objects");
    }
    const JsonFields row(value, fields.file(), fmt::format("{}.{}.", kField, key));
    GLOAM_RETURN_IF_ERROR(ReadHfAddedToken(row, &added));
    tokens->push_back(std::move(added));
  }
  return OkStatus();
}

StatusOr<HfConfig> ReadConfig(const std::filesystem::path& folder) {
  HfConfig config;
  const auto path = folder / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return config;
  GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(path));
  const JsonFields fields(document, path.string());
  GLOAM_RETURN_IF_ERROR(ReadTokenName(fields, "bos_token", &config.bos_token));
  GLOAM_RETURN_IF_ERROR(ReadTokenName(fields, "eos_token", &config.eos_token));
  GLOAM_RETURN_IF_ERROR(ReadFlag(fields, "add_bos_token", &config.add_bos_token));
  GLOAM_RETURN_IF_ERROR(ReadFlag(fields, "add_eos_token", &config.add_eos_token));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("legacy", &config.legacy));
  GLOAM_RETURN_IF_ERROR(ReadAddedTokensDecoder(fields, &config.added_tokens));
  return config;
}

// tokenizer.model with the tokens that tokenizer_config.json adds.
StatusOr<TokenizerParts> ReadSentencePiece(const std::filesystem::path& path,
                                           const HfConfig& config) {
  std::ifstream in(path, std::ios::binary);
  const std::string proto{std::istreambuf_iterator<char>(in), {}};
  if (!in.good() && !in.eof()) return NotFound("{}: cannot be read", path.string());
  std::string error;
  const auto model = SentencePieceModel::Load(proto, &error);
  if (model == nullptr) return InvalidArgument("{}: {}", path.string(), error);

  std::vector<std::string> names;
  std::vector<TokenKind> kinds;
  for (int id = 0; id < model->size(); ++id) {
    names.emplace_back(model->PieceName(id));
    kinds.push_back(static_cast<TokenKind>(model->PieceKind(id)));
  }
  TokenizerParts parts;
  std::vector<HfAddedToken> added = config.added_tokens;
  std::sort(added.begin(), added.end(),
            [](const HfAddedToken& a, const HfAddedToken& b) { return a.token.id < b.token.id; });
  for (const HfAddedToken& a : added) {
    const auto id = static_cast<size_t>(a.token.id);
    const TokenKind kind = a.token.special ? TokenKind::kControl : TokenKind::kUserDefined;
    if (id > names.size() || (id < names.size() && names[id] != a.token.content)) {
      return InvalidArgument("{}: tokenizer_config.json adds '{}' as {}, beside a vocabulary of {}",
                             path.string(), a.token.content, id, names.size());
    }
    if (id == names.size()) {
      names.push_back(a.token.content);
      kinds.push_back(kind);
    } else if (kinds[id] != TokenKind::kUnknown) {
      kinds[id] = kind;
    }
    parts.added_tokens.push_back(a.token);
  }
  GLOAM_ASSIGN_OR_RETURN(TokenTable table, TokenTable::Make(std::move(names), std::move(kinds),
                                                            TokenSpelling::kMetaspace));
  parts.table = std::make_unique<const TokenTable>(std::move(table));
  if (added.empty()) {
    for (int32_t id = 0; id < model->size(); ++id) {
      if (!parts.table->IsSpecial(id)) continue;
      parts.added_tokens.push_back({.id = id, .content = parts.table->name(id), .special = true});
    }
  }
  GLOAM_ASSIGN_OR_RETURN(
      parts.encoder, MakeSentencePieceEncoder(
                         proto, config.legacy ? PrefixRule::kEveryPiece : PrefixRule::kFirstPiece));
  parts.strips_leading_space = AddsDummyPrefix(proto);
  // Llama's own habit, unless tokenizer_config.json says otherwise (below).
  if (model->bos_id() >= 0) parts.prefix.push_back(model->bos_id());
  if (model->bos_id() >= 0) parts.bos_id = model->bos_id();
  if (model->eos_id() >= 0) parts.eos_ids.push_back(model->eos_id());
  return parts;
}

// Puts `id` at the prompt's end that `ids` is, or takes it away, as the file's flag says.
void ApplyFlag(std::optional<bool> flag, std::optional<int32_t> id, std::vector<int32_t>* ids) {
  if (!flag || !id) return;
  std::erase(*ids, *id);
  if (*flag) ids->insert(ids->begin(), *id);
}

}  // namespace

StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizerFolder(const std::filesystem::path& folder,
                                                         std::vector<int32_t> eos_ids) {
  GLOAM_ASSIGN_OR_RETURN(const HfConfig config, ReadConfig(folder));
  TokenizerParts parts;
  const auto json_path = folder / "tokenizer.json", model_path = folder / "tokenizer.model";
  if (std::filesystem::exists(json_path)) {
    GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(json_path));
    GLOAM_ASSIGN_OR_RETURN(parts,
                           ReadTokenizerJson(document, json_path.string(), config.added_tokens));
  } else if (std::filesystem::exists(model_path)) {
    GLOAM_ASSIGN_OR_RETURN(parts, ReadSentencePiece(model_path, config));
  } else {
    return NotFound("{}: has neither tokenizer.json nor tokenizer.model", folder.string());
  }
  const auto bos = parts.table->Find(config.bos_token);
  if (bos) parts.bos_id = bos;
  if (!parts.bos_id && !parts.prefix.empty()) parts.bos_id = parts.prefix.front();
  const auto eos = parts.table->Find(config.eos_token);
  if (eos) parts.eos_ids.push_back(*eos);
  for (const int32_t id : eos_ids) {
    if (id < 0 || id >= parts.table->size()) {
      return InvalidArgument("{}: eos_token_id {} is not in a vocabulary of {}", folder.string(),
                             id, parts.table->size());
    }
    parts.eos_ids.push_back(id);
  }
  ApplyFlag(config.add_bos_token, parts.bos_id, &parts.prefix);
  ApplyFlag(config.add_eos_token, eos, &parts.suffix);
  return MakeCompositeTokenizer(std::move(parts));
}

}  // namespace gloam
