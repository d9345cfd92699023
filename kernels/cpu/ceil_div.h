// Quotients rounded up.
#pragma once

#include <cstdint>

namespace gloam::cpu {

// a / b rounded up, of a >= 0 and b > 0.
inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gloam::cpu
