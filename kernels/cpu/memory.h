// Allocation of host memory: zeroed, 64-byte aligned, large ones in huge pages and lazily.
#pragma once

#include <cstddef>

#include "base/status.h"
#include "kernels/ops.h"

namespace gloam::cpu {

// Errors: kResourceExhausted with the size asked for. Any thread.
[[nodiscard]] StatusOr<Buffer> AllocateBuffer(size_t bytes);

}  // namespace gloam::cpu
