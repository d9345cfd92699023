#include "kernels/cuda/prefill/fa2_launch.cuh"

namespace gloam::cuda {

void RunFa2F16x64(const Fa2Params& params) { RunFa2<__half, 64>(params); }

}  // namespace gloam::cuda
