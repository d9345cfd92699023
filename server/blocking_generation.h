// RunBlocking: one generation in the calling thread's time, for the command line.
#pragma once

#include <functional>

#include "server/generation_service.h"
#include "server/running_generation.h"

namespace gloam {

// Submits `prepared` and calls `on_delta` for every delta until the last answer has ended. With a
// false from `on_delta` it cancels and returns. Errors: those of Submit, or of an answer.
[[nodiscard]] StatusOr<RequestSummary> RunBlocking(
    Engine& engine, PreparedGeneration prepared,
    const std::function<bool(const OutputDelta&)>& on_delta);

}  // namespace gloam
