// Sizes of tests that compute-sanitizer can get through: its racecheck takes a second for about a
// million accesses to shared memory.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace gloam::cuda {

// GLOAM_TEST_SIZES=small (tests/kernels/cuda/sanitize sets it): as many kernels and branches, by
// fewer and smaller shapes. A GPU of few SMs (CudaFixture) helps: each thread block has several
// tiles or chunks of a small matrix, contexts are split, rings go round.
inline bool HasSmallSizes() {
  const char* sizes = std::getenv("GLOAM_TEST_SIZES");
  return sizes != nullptr && std::string_view(sizes) == "small";
}

// What a test goes through: `usual`, or `small`.
template <typename T>
T Sized(T usual, T small) {
  return HasSmallSizes() ? small : usual;
}
template <typename T>
std::vector<T> Sized(std::initializer_list<T> usual, std::initializer_list<T> small) {
  return HasSmallSizes() ? small : usual;
}

}  // namespace gloam::cuda
