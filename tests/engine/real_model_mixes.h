// What tests of a real model in the engine share.
#pragma once

#include <string>

#include "kernels/ops.h"
#include "models/model.h"

namespace gloam {

// Greedy answers, and the log-probabilities of their tokens, are the same bits whatever the batch,
// the chunks, the prefix cache and pre-emption: 200 random mixes against each request alone. A
// Catch2 test's body. `model_name`: whose golden texts to take; without, tokens at random.
void CheckMixes(const LoadedModel& loaded, Ops& ops, const std::string& model_name, DType kv_dtype);

}  // namespace gloam
