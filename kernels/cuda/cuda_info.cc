#include "kernels/cuda_info.h"

#include <cuda_runtime_api.h>

#include <fstream>

#include "fmt/format.h"
#include "kernels/cuda/gemm/cublas_lt.h"

namespace gloam {
namespace {

std::string Version(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

// Of the kernel module; empty where the system does not say.
std::string DriverVersion() {
  std::ifstream file("/sys/module/nvidia/version");
  std::string version;
  file >> version;
  return version;
}

std::string DescribeDriver() {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return fmt::format("no driver; the program has runtime {}", Version(runtime));
  }
  const std::string module = DriverVersion();
  return fmt::format("driver {}for CUDA up to {}, runtime {}",
                     module.empty() ? module : module + " ", Version(driver), Version(runtime));
}

std::string DescribeDevice(int device) {
  cudaDeviceProp properties{};
  size_t free_bytes = 0, total_bytes = 0;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  constexpr double kGibibyte = 1024.0 * 1024 * 1024;
  return fmt::format("{}, compute capability {}.{}, {:.1f} GiB free of {:.1f} GiB{}",
                     properties.name, properties.major, properties.minor,
                     static_cast<double>(free_bytes) / kGibibyte,
                     static_cast<double>(total_bytes) / kGibibyte,
                     properties.major < 8 ? ": too old, 8.0 is needed" : "");
}

// The library that large matrix products are loaded from.
std::string DescribeCublasLt() {
  const auto library = cuda::CublasLt::Load();
  return library.ok() ? "can be loaded" : MessageOf(library.status());
}

}  // namespace

std::vector<std::pair<std::string, std::string>> DescribeCuda() {
  std::vector<std::pair<std::string, std::string>> rows = {{"CUDA", DescribeDriver()}};
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    rows.emplace_back("GPU",
                      fmt::format("none: {}", error == cudaSuccess ? "the driver lists none"
                                                                   : cudaGetErrorString(error)));
  }
  for (int device = 0; error == cudaSuccess && device < num_devices; ++device) {
    rows.emplace_back("GPU", DescribeDevice(device));
  }
  rows.emplace_back("cuBLASLt", DescribeCublasLt());
  return rows;
}

}  // namespace gloam
