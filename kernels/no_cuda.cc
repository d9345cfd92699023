// What a build without CUDA has instead of kernels/cuda/.
#include "kernels/cuda_info.h"
#include "kernels/ops.h"

namespace gloam {
namespace {

constexpr const char* kWithout =
    "this program was built without CUDA; build it where nvcc is (GLOAM_CUDA=ON)";

}  // namespace

StatusOr<std::unique_ptr<Ops>> MakeCudaOps(const CudaOptions& /*options*/) {
  return MakeStatus(StatusCode::kUnavailable, "{}", kWithout);
}

std::vector<std::pair<std::string, std::string>> DescribeCuda() { return {{"GPU", kWithout}}; }

}  // namespace gloam
