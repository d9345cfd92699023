#include "kernels/cuda/prefill/fa3_launch.cuh"

namespace gloam::cuda {

void RunFa3Bf16x128(const Fa3Params& params) { RunFa3<cutlass::bfloat16_t, 128>(params); }

}  // namespace gloam::cuda
