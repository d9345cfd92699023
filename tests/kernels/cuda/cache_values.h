// Values in the types that a cache on a GPU holds, as bytes: shared by the tests that fill caches
// and read them.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/check.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {

// Of rotated queries over a cache of `dtype`.
inline DType QueryDTypeOf(DType dtype) { return dtype == DType::kF8E4M3 ? DType::kF16 : dtype; }

inline std::vector<uint8_t> ToBytes(DType dtype, std::span<const float> values) {
  std::vector<uint8_t> bytes(values.size() * DTypeBytes(dtype));
  if (dtype == DType::kF8E4M3) {
    for (size_t i = 0; i < values.size(); ++i) {
      bytes[i] = __nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3);
    }
  } else {
    std::memcpy(bytes.data(), RoundTo(dtype, values).data(), bytes.size());
  }
  return bytes;
}

inline std::vector<float> FromBytes(DType dtype, std::span<const uint8_t> bytes) {
  std::vector<uint16_t> bits(bytes.size() / DTypeBytes(dtype));
  if (dtype == DType::kF8E4M3) {
    for (size_t i = 0; i < bits.size(); ++i) {
      bits[i] = __nv_cvt_fp8_to_halfraw(bytes[i], __NV_E4M3).x;  // exact
    }
  } else {
    std::memcpy(bits.data(), bytes.data(), bytes.size());
  }
  return ToFloat(QueryDTypeOf(dtype), bits);
}

}  // namespace gloam::cuda
