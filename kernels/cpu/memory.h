// Allocation of host memory: zeroed, 64-byte aligned, those of 128 KiB and more in huge pages.
#pragma once

#include <cstddef>

#include "base/status.h"
#include "kernels/ops.h"

namespace gloam::cpu {

// Errors: kResourceExhausted with the size asked for. Any thread.
[[nodiscard]] StatusOr<Buffer> AllocateBuffer(size_t bytes);

}  // namespace gloam::cpu
