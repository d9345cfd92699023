// InspectModel: the text report of `gloam inspect MODEL`.
#pragma once

#include <ostream>

#include "base/status.h"
#include "models/model_file.h"

namespace gloam {

struct InspectOptions {
  bool list_tensors = false;
};

// Writes what the file holds: numbers, parameters, bytes by type, rope, KV cache per token,
// tokenizer, chat template. A tokenizer that cannot be loaded is reported, not an error.
void InspectModel(const ModelFile& file, const InspectOptions& options, std::ostream& out);

}  // namespace gloam
