// Reading and writing of the few fields of SentencePiece's ModelProto that concern us, in
// Protobuf's wire format (field numbers: sentencepiece_model.proto). Pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "models/tokenizer/token_table.h"

namespace gloam {

// A BPE model with byte fallback and no normalisation. `scores` are parallel to the table.
std::string MakeSentencePieceProto(const TokenTable& table, const std::vector<float>& scores,
                                   bool add_dummy_prefix);

// Whether the model puts a space in front of the text; true where `proto` does not say.
bool AddsDummyPrefix(std::string_view proto);

// The same model, which puts no space in front.
std::string WithoutDummyPrefix(std::string_view proto);

}  // namespace gloam
