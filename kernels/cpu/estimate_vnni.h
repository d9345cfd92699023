// A switch for tests of cpu/estimate.cc.
#pragma once

namespace gloam::cpu {

// Makes the AVX-512 kernels of Estimate() do without VNNI, so that a test on a newer host covers
// that path.
void DisableEstimateVnniForTest(bool disable);

}  // namespace gloam::cpu
