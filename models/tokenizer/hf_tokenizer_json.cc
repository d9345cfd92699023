#include "models/tokenizer/hf_tokenizer_json.h"

#include <algorithm>

#include "models/tokenizer/bpe_encoder.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr std::string_view kMetaspace = "\xE2\x96\x81";  // U+2581

// An object of the document with its place: "tokenizer.json: pre_tokenizer.pretokenizers[1].".
class Node {
 public:
  Node(const json& object, std::string file, const std::string& path)
      : object_(object),
        path_(path),
        fields_(object, std::move(file), path.empty() ? "" : path + ".") {}

  const JsonFields& fields() const { return fields_; }
  const json& object() const { return object_; }

  std::string Type() const {
    const json* type = fields_.Find("type");
    return type != nullptr && type->is_string() ? type->get<std::string>() : "";
  }

  Status Unsupported(std::string_view what) const {
    return Unimplemented("{}: {}: {} is not supported", fields_.file(), path_, what);
  }

  // The objects of an array.
  StatusOr<std::vector<Node>> Children(const std::string& field) const {
    const json* list = fields_.Find(field);
    if (list == nullptr || !list->is_array()) return fields_.Error(field, "must be an array");
    std::vector<Node> nodes;
    for (size_t i = 0; i < list->size(); ++i) {
      const std::string name = fmt::format("{}[{}]", field, i);
      if (!(*list)[i].is_object()) return fields_.Error(name, "must be an object");
      nodes.emplace_back((*list)[i], fields_.file(), fields_.NameOf(name));
    }
    return nodes;
  }

  // An optional object: none where the field is absent.
  StatusOr<std::vector<Node>> Child(const std::string& field) const {
    const json* child = fields_.Find(field);
    if (child == nullptr) return std::vector<Node>();
    if (!child->is_object()) return fields_.Error(field, "must be an object");
    return std::vector<Node>{Node(*child, fields_.file(), fields_.NameOf(field))};
  }

 private:
  const json& object_;
  std::string path_;
  JsonFields fields_;
};

// Steps of a kind: one object, or the items of a "Sequence".
StatusOr<std::vector<Node>> StepsOf(const Node& root, const std::string& field,
                                    const std::string& items) {
  GLOAM_ASSIGN_OR_RETURN(std::vector<Node> steps, root.Child(field));
  if (steps.empty() || steps[0].Type() != "Sequence") return steps;
  return steps[0].Children(items);
}

class Reader {
 public:
  Reader(const json& document, std::string file) : root_(document, std::move(file), "") {}

  StatusOr<TokenizerParts> Read(const std::vector<HfAddedToken>& more_tokens) {
    GLOAM_RETURN_IF_ERROR(ReadNormalizer());
    GLOAM_RETURN_IF_ERROR(ReadPreTokenizer());
    GLOAM_RETURN_IF_ERROR(ReadDecoder());
    GLOAM_RETURN_IF_ERROR(ReadAddedTokens(more_tokens));
    GLOAM_ASSIGN_OR_RETURN(const std::vector<Node> model, root_.Child("model"));
    if (model.empty()) return root_.fields().Error("model", "is missing");
    GLOAM_RETURN_IF_ERROR(ReadVocabulary(model[0]));
    GLOAM_RETURN_IF_ERROR(ReadModel(model[0]));
    GLOAM_RETURN_IF_ERROR(ReadPostProcessor());
    return std::move(parts_);
  }

 private:
  Status ReadNormalizer();
  Status ReadPreTokenizer();
  Status ReadSplit(const Node& step);
  Status ReadByteLevel(const Node& step, bool is_first);
  Status ReadMetaspace(const Node& step, bool is_only);
  Status ReadDecoder();
  Status ReadAddedTokens(const std::vector<HfAddedToken>& more_tokens);
  Status ReadVocabulary(const Node& model);
  Status PlaceToken(const JsonFields& fields, const std::string& name, int64_t id, TokenKind kind);
  Status ReadModel(const Node& model);
  StatusOr<std::vector<BpeEncoder::Merge>> ReadMerges(const Node& model) const;
  Status ReadPostProcessor();
  Status AddSplit(const Node& step, const std::string& pattern, bool keep_matches, bool keep_gaps);

  Node root_;
  BpeConfig config_{.byte_level = false};
  std::vector<PreTokenizer::Split> splits_;
  bool decodes_byte_chars_ = false;
  std::vector<HfAddedToken> added_;
  std::vector<std::string> names_;
  std::vector<TokenKind> kinds_;
  TokenizerParts parts_;
};

Status Reader::ReadNormalizer() {
  GLOAM_ASSIGN_OR_RETURN(const auto steps, StepsOf(root_, "normalizer", "normalizers"));
  TextRewrite& rewrite = config_.normalizer;
  for (const Node& step : steps) {
    const std::string type = step.Type();
    const bool is_late = rewrite.prefix_rule != PrefixRule::kNever || !rewrite.replacements.empty();
    if (type == "NFC" && !is_late) {
      rewrite.nfc = true;
    } else if (type == "Prepend" && !is_late) {
      GLOAM_RETURN_IF_ERROR(step.fields().String("prepend", &rewrite.prefix));
      rewrite.prefix_rule = PrefixRule::kEveryPiece;
    } else if (type == "Replace") {
      GLOAM_ASSIGN_OR_RETURN(const auto pattern, step.Child("pattern"));
      if (pattern.empty() || !pattern[0].fields().Has("String")) {
        return step.Unsupported("a pattern that is not a String");
      }
      TextRewrite::Replacement replacement;
      GLOAM_RETURN_IF_ERROR(pattern[0].fields().String("String", &replacement.from));
      GLOAM_RETURN_IF_ERROR(step.fields().String("content", &replacement.to));
      if (replacement.from.empty()) return step.fields().Error("pattern", "is empty");
      rewrite.replacements.push_back(std::move(replacement));
    } else {
      return step.Unsupported(fmt::format("the normalizer '{}' at this place", type));
    }
  }
  return OkStatus();
}

Status Reader::ReadPreTokenizer() {
  GLOAM_ASSIGN_OR_RETURN(const auto steps, StepsOf(root_, "pre_tokenizer", "pretokenizers"));
  for (size_t i = 0; i < steps.size(); ++i) {
    const Node& step = steps[i];
    const std::string type = step.Type();
    if (config_.byte_level) return step.Unsupported("a step after ByteLevel");
    if (type == "Split") {
      GLOAM_RETURN_IF_ERROR(ReadSplit(step));
    } else if (type == "Digits") {
      bool individual = false;
      GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("individual_digits", &individual));
      GLOAM_RETURN_IF_ERROR(AddSplit(step, individual ? R"(\p{N})" : R"(\p{N}+)", true, true));
    } else if (type == "ByteLevel") {
      GLOAM_RETURN_IF_ERROR(ReadByteLevel(step, i == 0));
    } else if (type == "Metaspace") {
      GLOAM_RETURN_IF_ERROR(ReadMetaspace(step, steps.size() == 1));
    } else {
      return step.Unsupported(fmt::format("the pre-tokenizer '{}'", type));
    }
  }
  config_.pre_tokenizer = PreTokenizer(std::move(splits_));
  return OkStatus();
}

Status Reader::AddSplit(const Node& step, const std::string& pattern, bool keep_matches,
                        bool keep_gaps) {
  auto regex = Regex::Compile(pattern);
  if (!regex.ok()) {
    return Status(regex.status().code(), step.fields().file() + ": " +
                                             step.fields().NameOf("pattern") + ": " +
                                             MessageOf(regex.status()));
  }
  splits_.push_back({*std::move(regex), keep_matches, keep_gaps});
  return OkStatus();
}

Status Reader::ReadSplit(const Node& step) {
  GLOAM_ASSIGN_OR_RETURN(const auto pattern, step.Child("pattern"));
  if (pattern.empty()) return step.fields().Error("pattern", "is missing");
  std::string text, behavior;
  if (pattern[0].fields().Has("String")) {
    GLOAM_RETURN_IF_ERROR(pattern[0].fields().String("String", &text));
    text = Regex::Quote(text);
  } else {
    GLOAM_RETURN_IF_ERROR(pattern[0].fields().String("Regex", &text));
  }
  GLOAM_RETURN_IF_ERROR(step.fields().String("behavior", &behavior));
  bool invert = false;
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("invert", &invert));
  if (behavior != "Isolated" && behavior != "Removed") {
    return step.Unsupported(fmt::format("the behavior '{}'", behavior));
  }
  const bool removes = behavior == "Removed";
  return AddSplit(step, text, !removes || invert, !removes || !invert);
}

Status Reader::ReadByteLevel(const Node& step, bool is_first) {
  bool add_prefix_space = true, use_regex = true;
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("add_prefix_space", &add_prefix_space));
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("use_regex", &use_regex));
  if (add_prefix_space) {
    if (!is_first) return step.Unsupported("add_prefix_space after other steps");
    config_.piece_rewrite.prefix_rule = PrefixRule::kEveryPiece;
    config_.piece_rewrite.prefix = " ";
    config_.piece_rewrite.prefix_unless_present = true;
  }
  config_.byte_level = true;
  if (!use_regex) return OkStatus();
  return AddSplit(step, std::string(Gpt2Pattern()), true, true);
}

Status Reader::ReadMetaspace(const Node& step, bool is_only) {
  if (!is_only) return step.Unsupported("Metaspace beside other steps");
  std::string replacement(kMetaspace), scheme = "always";
  bool split = true, add_prefix_space = true;
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalString("replacement", &replacement));
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("add_prefix_space", &add_prefix_space));
  if (!add_prefix_space) scheme = "never";  // what older files say
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalString("prepend_scheme", &scheme));
  GLOAM_RETURN_IF_ERROR(step.fields().OptionalBool("split", &split));
  if (replacement != kMetaspace) return step.Unsupported("a replacement other than U+2581");
  TextRewrite& rewrite = config_.piece_rewrite;
  if (scheme == "always") {
    rewrite.prefix_rule = PrefixRule::kEveryPiece;
  } else if (scheme == "first") {
    rewrite.prefix_rule = PrefixRule::kFirstPiece;
  } else if (scheme != "never") {
    return step.Unsupported(fmt::format("the prepend_scheme '{}'", scheme));
  }
  // The prefix is put in front after the replacement, unless one is there: a leading space counts.
  config_.normalizer.replacements.push_back({" ", replacement});
  rewrite.prefix = replacement;
  rewrite.prefix_unless_present = true;
  if (!split) return OkStatus();
  return AddSplit(step, fmt::format("{0}[^{0}]*|[^{0}]+", kMetaspace), true, true);
}

// Decoders come in two families: ByteLevel, and U+2581 for spaces with bytes to fall back on.
Status Reader::ReadDecoder() {
  GLOAM_ASSIGN_OR_RETURN(const auto steps, StepsOf(root_, "decoder", "decoders"));
  if (steps.empty()) {
    decodes_byte_chars_ = config_.byte_level;
    return OkStatus();
  }
  for (const Node& step : steps) {
    const std::string type = step.Type();
    if (type == "ByteLevel" && steps.size() == 1) {
      decodes_byte_chars_ = true;
    } else if (type == "Metaspace") {
      std::string scheme = "always";
      GLOAM_RETURN_IF_ERROR(step.fields().OptionalString("prepend_scheme", &scheme));
      parts_.strips_leading_space = scheme != "never";
    } else if (type == "Strip") {
      int start = 0, stop = 0;
      GLOAM_RETURN_IF_ERROR(step.fields().OptionalInt("start", &start));
      GLOAM_RETURN_IF_ERROR(step.fields().OptionalInt("stop", &stop));
      if (start > 1 || stop > 0) return step.Unsupported("more than one leading character");
      parts_.strips_leading_space = start == 1;
    } else if (type == "Replace") {
      const json replace = {{"String", kMetaspace}};
      if (step.object().value("pattern", json()) != replace ||
          step.object().value("content", json()) != " ") {
        return step.Unsupported("any replacement but that of U+2581 by a space");
      }
    } else if (type != "ByteFallback" && type != "Fuse") {
      return step.Unsupported(fmt::format("the decoder '{}'", type));
    }
  }
  return OkStatus();
}

Status Reader::ReadAddedTokens(const std::vector<HfAddedToken>& more_tokens) {
  if (root_.fields().Has("added_tokens")) {
    GLOAM_ASSIGN_OR_RETURN(const auto nodes, root_.Children("added_tokens"));
    for (const Node& node : nodes) {
      HfAddedToken added;
      int id = 0;
      GLOAM_RETURN_IF_ERROR(node.fields().Int("id", &id));
      added.token.id = id;
      GLOAM_RETURN_IF_ERROR(ReadHfAddedToken(node.fields(), &added));
      added_.push_back(std::move(added));
    }
  }
  for (const HfAddedToken& more : more_tokens) {
    const bool known = std::any_of(added_.begin(), added_.end(), [&](const HfAddedToken& a) {
      return a.token.id == more.token.id;
    });
    if (!known) added_.push_back(more);
  }
  for (HfAddedToken& added : added_) {
    // Special tokens are looked for in the text as it came, whatever "normalized" says: a prefix
    // that the normaliser adds would keep them from ever being found.
    if (added.normalized && !added.token.special) {
      AddedToken token = added.token;
      token.content = config_.normalizer.Run(token.content, /*at_start=*/true);
      config_.normalized_tokens.push_back(std::move(token));
    } else {
      parts_.added_tokens.push_back(added.token);
    }
  }
  return OkStatus();
}

Status Reader::PlaceToken(const JsonFields& fields, const std::string& name, int64_t id,
                          TokenKind kind) {
  if (id < 0 || id >= static_cast<int64_t>(names_.size())) {
    return fields.Error(name, fmt::format("has the id {}, not in [0, {})", id, names_.size()));
  }
  if (kinds_[id] != TokenKind::kUnused && names_[id] != name) {
    return fields.Error(name, fmt::format("has the id {} of '{}'", id, names_[id]));
  }
  names_[id] = name;
  kinds_[id] = kind;
  return OkStatus();
}

Status Reader::ReadVocabulary(const Node& model) {
  const json* vocab = model.fields().Find("vocab");
  if (vocab == nullptr || !vocab->is_object()) {
    return model.fields().Error("vocab", "must be an object");
  }
  const size_t num_entries = vocab->size() + added_.size();
  int64_t max_id = -1;
  for (const auto& [name, id] : vocab->items()) {
    if (!id.is_number_unsigned()) return model.fields().Error("vocab", "must hold ids");
    max_id = std::max(max_id, id.get<int64_t>());
  }
  for (const HfAddedToken& added : added_) max_id = std::max<int64_t>(max_id, added.token.id);
  // Real vocabularies have few holes; a file must not make us allocate much more than it holds.
  if (max_id < 0 || max_id >= static_cast<int64_t>(2 * num_entries + 65536)) {
    return model.fields().Error("vocab",
                                fmt::format("has the id {} among {} tokens", max_id, num_entries));
  }
  names_.resize(max_id + 1);
  kinds_.assign(max_id + 1, TokenKind::kUnused);
  GLOAM_RETURN_IF_ERROR(model.fields().OptionalBool("byte_fallback", &config_.byte_fallback));
  for (const auto& [name, id] : vocab->items()) {
    const bool is_byte = config_.byte_fallback && name.size() == 6 && name.starts_with("<0x");
    GLOAM_RETURN_IF_ERROR(PlaceToken(model.fields(), name, id.get<int64_t>(),
                                     is_byte ? TokenKind::kByte : TokenKind::kNormal));
  }
  for (const HfAddedToken& added : added_) {
    GLOAM_RETURN_IF_ERROR(
        PlaceToken(root_.fields(), added.token.content, added.token.id,
                   added.token.special ? TokenKind::kControl : TokenKind::kUserDefined));
  }
  GLOAM_ASSIGN_OR_RETURN(TokenTable table,
                         TokenTable::Make(std::move(names_), std::move(kinds_),
                                          decodes_byte_chars_ ? TokenSpelling::kByteChars
                                                              : TokenSpelling::kMetaspace));
  parts_.table = std::make_unique<const TokenTable>(std::move(table));
  return OkStatus();
}

Status Reader::ReadModel(const Node& model) {
  const JsonFields& fields = model.fields();
  const std::string type = model.Type();
  if (!type.empty() && type != "BPE") return model.Unsupported(fmt::format("the type '{}'", type));
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    std::string value;
    GLOAM_RETURN_IF_ERROR(fields.OptionalString(affix, &value));
    if (!value.empty()) return model.Unsupported(affix);
  }
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("ignore_merges", &config_.ignore_merges));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("fuse_unk", &config_.fuse_unknown));
  std::string unknown;
  GLOAM_RETURN_IF_ERROR(fields.OptionalString("unk_token", &unknown));
  if (!unknown.empty()) {
    const auto id = parts_.table->Find(unknown);
    if (!id) return fields.Error("unk_token", "is not in the vocabulary");
    config_.unknown_id = *id;
  }
  GLOAM_ASSIGN_OR_RETURN(const auto merges, ReadMerges(model));
  auto encoder = BpeEncoder::Make(*parts_.table, merges, std::move(config_));
  if (!encoder.ok()) return fields.Error("merges", MessageOf(encoder.status()));
  parts_.encoder = *std::move(encoder);
  return OkStatus();
}

StatusOr<std::vector<BpeEncoder::Merge>> Reader::ReadMerges(const Node& model) const {
  const json* list = model.fields().Find("merges");
  if (list == nullptr || !list->is_array()) {
    return model.fields().Error("merges", "must be an array");
  }
  std::vector<BpeEncoder::Merge> merges;
  merges.reserve(list->size());
  for (const json& item : *list) {
    // ["left", "right"], or "left right" in older files.
    if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      merges.emplace_back(item[0].get_ref<const std::string&>(),
                          item[1].get_ref<const std::string&>());
      continue;
    }
    const std::string_view line = item.is_string() ? item.get_ref<const std::string&>() : "";
    const size_t space = line.find(' ');
    if (space == std::string_view::npos || space == 0 || space + 1 == line.size()) {
      return model.fields().Error(fmt::format("merges[{}]", merges.size()), "is not a pair");
    }
    merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  return merges;
}

Status Reader::ReadPostProcessor() {
  GLOAM_ASSIGN_OR_RETURN(const auto steps, StepsOf(root_, "post_processor", "processors"));
  for (const Node& step : steps) {
    if (step.Type() == "ByteLevel") continue;  // concerns offsets alone
    if (step.Type() != "TemplateProcessing") {
      return step.Unsupported(fmt::format("the post-processor '{}'", step.Type()));
    }
    GLOAM_ASSIGN_OR_RETURN(const auto single, step.Children("single"));
    std::vector<int32_t>* side = &parts_.prefix;
    for (const Node& item : single) {
      GLOAM_ASSIGN_OR_RETURN(const auto special, item.Child("SpecialToken"));
      if (special.empty()) {
        side = &parts_.suffix;
        continue;
      }
      std::string name;
      GLOAM_RETURN_IF_ERROR(special[0].fields().String("id", &name));
      GLOAM_ASSIGN_OR_RETURN(const auto tokens, step.Child("special_tokens"));
      const json* token = tokens.empty() ? nullptr : tokens[0].fields().Find(name);
      if (token == nullptr || !token->is_object()) {
        return step.fields().Error("special_tokens", fmt::format("lacks '{}'", name));
      }
      std::vector<int32_t> ids;
      GLOAM_RETURN_IF_ERROR(
          JsonFields(*token, step.fields().file(), tokens[0].fields().NameOf(name) + ".")
              .OptionalInts("ids", &ids));
      for (const int32_t id : ids) {
        if (id >= parts_.table->size()) {
          return step.fields().Error("special_tokens", fmt::format("has the id {}", id));
        }
        side->push_back(id);
      }
    }
  }
  return OkStatus();
}

}  // namespace

Status ReadHfAddedToken(const JsonFields& fields, HfAddedToken* added) {
  AddedToken& token = added->token;
  GLOAM_RETURN_IF_ERROR(fields.String("content", &token.content));
  if (token.content.empty()) return fields.Error("content", "is empty");
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("special", &token.special));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("single_word", &token.single_word));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("lstrip", &token.lstrip));
  GLOAM_RETURN_IF_ERROR(fields.OptionalBool("rstrip", &token.rstrip));
  return fields.OptionalBool("normalized", &added->normalized);
}

StatusOr<TokenizerParts> ReadTokenizerJson(const json& document, const std::string& file,
                                           const std::vector<HfAddedToken>& more_tokens) {
  return Reader(document, file).Read(more_tokens);
}

}  // namespace gloam
