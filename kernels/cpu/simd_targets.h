// The instruction sets that Highway compiles for, the same in every file: comes before its headers.
// Scalable vectors cannot be array elements, which register tiles need; a CPU with SSSE3 has SSE4
// but for those of 2006.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3)
