#include "kernels/cuda/gemm/cublas_lt.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "base/check.h"

namespace gloam::cuda {
namespace {

constexpr const char* kLibrary = "libcublasLt.so.13";

std::vector<std::string> Candidates() {
  std::vector<std::string> paths;
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) paths.push_back((program.parent_path().parent_path() / "lib" / kLibrary).string());
  paths.emplace_back(kLibrary);
  for (const char* folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda/lib/"}) {
    paths.push_back(std::string(folder) + kLibrary);
  }
  return paths;
}

// Largest power of two, up to 256, that divides the address.
int Alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<int>(address & (~address + 1));
}

// A failure after loading: the library and its caller disagree.
void Check(cublasStatus_t status) { GLOAM_CHECK(status == CUBLAS_STATUS_SUCCESS); }

}  // namespace

struct CublasLt::Functions {
  void* library = nullptr;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) config_get = nullptr;

  template <typename F>
  bool Find(const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  }

  bool FindAll() {
    return Find("cublasLtCreate", create) && Find("cublasLtDestroy", destroy) &&
           Find("cublasLtMatmul", matmul) && Find("cublasLtMatmulDescCreate", desc_create) &&
           Find("cublasLtMatmulDescDestroy", desc_destroy) &&
           Find("cublasLtMatmulDescSetAttribute", desc_set) &&
           Find("cublasLtMatrixLayoutCreate", layout_create) &&
           Find("cublasLtMatrixLayoutDestroy", layout_destroy) &&
           Find("cublasLtMatmulPreferenceCreate", preference_create) &&
           Find("cublasLtMatmulPreferenceDestroy", preference_destroy) &&
           Find("cublasLtMatmulPreferenceSetAttribute", preference_set) &&
           Find("cublasLtMatmulAlgoGetHeuristic", heuristic) &&
           Find("cublasLtMatmulAlgoConfigGetAttribute", config_get);
  }
};

// cuBLAS sees columns first: y^T [n, m] = w [n, k] x^T, with w stored as a [k, n] matrix.
struct CublasLt::Plan {
  explicit Plan(const Functions& f) : functions(f) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (cublasLtMatrixLayout_t layout : {w, x, y}) {
      if (layout != nullptr) functions.layout_destroy(layout);
    }
    if (desc != nullptr) functions.desc_destroy(desc);
  }

  const Functions& functions;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t y = nullptr;
  cublasLtMatmulAlgo_t algo = {};
};

StatusOr<std::unique_ptr<CublasLt>> CublasLt::Load() {
  std::unique_ptr<CublasLt> lt(new CublasLt);
  lt->functions_ = std::make_unique<Functions>();
  std::string tried;
  for (const std::string& path : Candidates()) {
    lt->functions_->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (lt->functions_->library != nullptr) break;
    tried += (tried.empty() ? "" : ", ") + path;
  }
  if (lt->functions_->library == nullptr) {
    return Unavailable("cannot load cuBLASLt 13; tried {}", tried);
  }
  if (!lt->functions_->FindAll()) return Unavailable("{} lacks functions of version 13", kLibrary);
  if (const cublasStatus_t status = lt->functions_->create(&lt->handle_);
      status != CUBLAS_STATUS_SUCCESS) {
    return Unavailable("cublasLtCreate failed with status {}", static_cast<int>(status));
  }
  return lt;
}

// The library stays loaded: its kernels may still run.
CublasLt::~CublasLt() {
  plans_.clear();
  if (handle_ != nullptr) functions_->destroy(handle_);
}

std::unique_ptr<CublasLt::Plan> CublasLt::MakePlan(const PlainProduct& product) {
  const Functions& f = *functions_;
  auto plan = std::make_unique<Plan>(f);
  Check(f.desc_create(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  Check(f.desc_set(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)));
  if (product.bias != nullptr) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    Check(f.desc_set(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue)));
  }
  const cudaDataType_t y_type = product.y_is_bf16 ? CUDA_R_16BF : CUDA_R_32F;
  Check(f.layout_create(&plan->w, CUDA_R_16BF, product.k, product.n, product.k));
  Check(f.layout_create(&plan->x, CUDA_R_16BF, product.k, product.m, product.x_stride));
  Check(f.layout_create(&plan->y, y_type, product.n, product.m, product.y_stride));

  cublasLtMatmulPreference_t preference = nullptr;
  Check(f.preference_create(&preference));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    Check(f.preference_set(preference, attribute, &value, sizeof(value)));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(Alignment(product.w)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(Alignment(product.x)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(Alignment(product.y)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(Alignment(product.y)));
  // Split sums meet in fp32, not in y's type.
  if (product.y_is_bf16) {
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  }
  std::array<cublasLtMatmulHeuristicResult_t, 8> results = {};
  int num_results = 0;
  const cublasStatus_t status =
      f.heuristic(handle_, plan->desc, plan->w, plan->x, plan->y, plan->y, preference,
                  static_cast<int>(results.size()), results.data(), &num_results);
  f.preference_destroy(preference);
  Check(status);
  GLOAM_CHECK(num_results >= 1);
  plan->algo = BestOf(std::span(results.data(), num_results), product);
  return plan;
}

// cuBLASLt's first choice, but for two cases. Down of Llama-3.1-8B on an H100 (2026-11-26), us, the
// first choice and the other:
// It splits the sums over k, which costs a pass over partial sums, where another fills the GPU in
// one go. That one's tiles have 64 rows of x, and where they do not divide m the split is faster.
// 48.2 and 44.8 for 64 rows, 54.0 and 46.8 for 128; but 51.7 and 60.3 for 96, 56.3 and 63.6 for
// 160, 63.5 and 68.2 for 224.
// Sums are long, and another takes larger tiles, which read less from L2, on fewer SMs: 59.4 and
// 56.9 for 256 rows, 85.0 and 69.7 for 384; but 81.3 and 86.8 for 512.
cublasLtMatmulAlgo_t CublasLt::BestOf(std::span<const cublasLtMatmulHeuristicResult_t> results,
                                      const PlainProduct& product) const {
  const auto num_splits = [&](const cublasLtMatmulAlgo_t& algo) {
    int32_t splits = 1;
    size_t size = 0;
    Check(functions_->config_get(&algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof(splits),
                                 &size));
    return splits;
  };
  // Of those that take one go, on so much of the GPU at least, without a split.
  const auto fewest_waves = [&](float least) {
    const cublasLtMatmulHeuristicResult_t* best = nullptr;
    for (const cublasLtMatmulHeuristicResult_t& result : results) {
      if (result.wavesCount < least || result.wavesCount > 1 || num_splits(result.algo) > 1)
        continue;
      if (best == nullptr || result.wavesCount < best->wavesCount) best = &result;
    }
    return best != nullptr ? best->algo : results[0].algo;
  };
  const int64_t m = product.m;
  if (m % 64 == 0 && num_splits(results[0].algo) > 1) return fewest_waves(0.9f);
  if (m % 128 == 0 && m > 128 && m <= 384 && product.k >= 2 * product.n) return fewest_waves(0.75f);
  return results[0].algo;
}

CublasLt::Plan& CublasLt::PlanFor(const PlainProduct& product) {
  constexpr size_t kMaxPlans = 4096;  // prompts come in every length
  const Key key(product.m, product.n, product.k, product.x_stride, product.y_stride,
                Alignment(product.x) | Alignment(product.w) << 10 | Alignment(product.y) << 20,
                product.bias != nullptr ? 1 : 0, product.y_is_bf16 ? 1 : 0);
  if (const auto it = plans_.find(key); it != plans_.end()) return *it->second;
  if (plans_.size() >= kMaxPlans) plans_.clear();
  return *(plans_[key] = MakePlan(product));
}

void CublasLt::Multiply(const PlainProduct& product, void* workspace, cudaStream_t stream) {
  GLOAM_CHECK(product.bias == nullptr || !product.y_is_bf16);
  Plan& plan = PlanFor(product);
  if (product.bias != nullptr) {
    Check(functions_->desc_set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias,
                               sizeof(product.bias)));
  }
  const float alpha = 1;
  const float beta = product.accumulate ? 1 : 0;
  Check(functions_->matmul(handle_, plan.desc, &alpha, product.w, plan.w, product.x, plan.x, &beta,
                           product.y, plan.y, product.y, plan.y, &plan.algo, workspace,
                           kWorkspaceBytes, stream));
}

}  // namespace gloam::cuda
