// BpeEncoder: normaliser, pre-tokenizer and merges of a BPE vocabulary: byte-level (GPT-2, Llama 3,
// Qwen2), or over characters with bytes to fall back on (Llama 2 as Hugging Face converts it).
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "models/tokenizer/added_tokens.h"
#include "models/tokenizer/bpe_merger.h"
#include "models/tokenizer/pre_tokenizer.h"
#include "models/tokenizer/text_encoder.h"
#include "models/tokenizer/token_table.h"

namespace gloam {

// When a prefix (a space, or U+2581) is put in front of a piece of text.
enum class PrefixRule { kNever, kFirstPiece, kEveryPiece };

// Changes to a text as a whole: form C, then a prefix, then replacements.
struct TextRewrite {
  struct Replacement {
    std::string from, to;  // `from` is not empty
  };
  bool nfc = false;
  PrefixRule prefix_rule = PrefixRule::kNever;
  std::string prefix;
  bool prefix_unless_present = false;  // not where the text begins with the prefix
  std::vector<Replacement> replacements;

  std::string Run(std::string_view text, bool at_start) const;
};

struct BpeConfig {
  bool byte_level = true;      // symbols are bytes; else characters
  bool byte_fallback = false;  // a character without a token becomes its <0xE2> tokens
  bool ignore_merges = false;  // a word that is a token is taken whole
  bool fuse_unknown = false;   // neighbouring unknown characters become one unknown token
  int32_t unknown_id = -1;     // for characters without a token; -1: they vanish
  TextRewrite normalizer;
  std::vector<AddedToken> normalized_tokens;  // found after normalisation, all user-defined
  TextRewrite piece_rewrite;                  // of the text between those
  PreTokenizer pre_tokenizer;
};

class BpeEncoder final : public TextEncoder {
 public:
  using Merge = std::pair<std::string_view, std::string_view>;  // names of the two tokens

  // `table` must outlive the encoder. `merges` in rank order.
  // Errors: kInvalidArgument naming the merge whose tokens the vocabulary lacks.
  [[nodiscard]] static StatusOr<std::unique_ptr<BpeEncoder>> Make(const TokenTable& table,
                                                                  const std::vector<Merge>& merges,
                                                                  BpeConfig config);

  [[nodiscard]] Status Encode(std::string_view text, bool at_start,
                              std::vector<int32_t>* ids) const override;

 private:
  struct Workspace;

  BpeEncoder(const TokenTable& table, BpeConfig config);
  Status AddMerges(const std::vector<Merge>& merges);
  Status EncodePiece(std::string_view text, bool at_start, Workspace* workspace,
                     std::vector<int32_t>* ids) const;
  void AppendSymbols(std::string_view word, std::vector<int32_t>* symbols) const;
  void AppendUnknown(std::string_view character, std::vector<int32_t>* symbols) const;

  const TokenTable& table_;
  BpeConfig config_;
  AddedTokens normalized_tokens_;
  BpeMerger merger_;
  std::array<int32_t, 256> byte_ids_;  // -1: no such token
  // What the words look up: byte-level, the tokens' bytes; else their names. Views into table_.
  absl::flat_hash_map<std::string_view, int32_t> ids_by_text_;
};

}  // namespace gloam
