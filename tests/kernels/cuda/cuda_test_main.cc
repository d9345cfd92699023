#define CATCH_CONFIG_RUNNER
#include <cuda_runtime_api.h>

#include <cstdio>

#include "catch2/catch.hpp"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;  // what ctest is told (SKIP_RETURN_CODE)
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0) {
    std::printf("skipped: no usable GPU\n");
    return kSkipped;
  }
  return Catch::Session().run(argc, argv);
}
