// What a build without CUDA has instead of kernels/cuda/.
#include "kernels/ops.h"

namespace gloam {

StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const CudaOptions& /*options*/) {
  return MakeStatus(StatusCode::kUnavailable,
                    "this program was built without CUDA; build it where nvcc is (GLOAM_CUDA=ON)");
}

}  // namespace gloam
