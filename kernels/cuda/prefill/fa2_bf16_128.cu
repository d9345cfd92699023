#include "kernels/cuda/prefill/fa2_launch.cuh"

namespace gloam::cuda {

void RunFa2Bf16x128(const Fa2Params& params) { RunFa2<__nv_bfloat16, 128>(params); }

}  // namespace gloam::cuda
