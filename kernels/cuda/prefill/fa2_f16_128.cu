#include "kernels/cuda/prefill/fa2_launch.cuh"

namespace gloam::cuda {

void RunFa2F16x128(const Fa2Params& params) { RunFa2<__half, 128>(params); }

}  // namespace gloam::cuda
