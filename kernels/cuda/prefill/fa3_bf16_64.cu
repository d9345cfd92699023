#include "kernels/cuda/prefill/fa3_launch.cuh"

namespace gloam::cuda {

void RunFa3Bf16x64(const Fa3Params& params) { RunFa3<cutlass::bfloat16_t, 64>(params); }

}  // namespace gloam::cuda
