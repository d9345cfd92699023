#include "kernels/cuda/prefill/fa3_launch.cuh"

namespace gloam::cuda {

void RunFa3F16x64(const Fa3Params& params) { RunFa3<cutlass::half_t, 64>(params); }

}  // namespace gloam::cuda
