#include "kernels/cuda/prefill/fa3_launch.cuh"

namespace gloam::cuda {

void RunFa3F16x128(const Fa3Params& params) { RunFa3<cutlass::half_t, 128>(params); }

}  // namespace gloam::cuda
