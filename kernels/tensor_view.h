// TensorView: where a tensor lies and what it looks like, without owning it. Every operation of
// kernels/ops.h takes views; owners are Buffer (kernels/ops.h), Weight (kernels/weight.h) and the
// engine's KvCachePool.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "base/check.h"

namespace gloam {

enum class DType : uint8_t { kF32, kF16, kBF16, kF8E4M3, kI32, kI64 };

constexpr size_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3:
      return 1;
    case DType::kI64:
      return 8;
  }
  return 0;
}

enum class Device : uint8_t { kCpu, kCuda };

struct TensorView {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::kF32;
  Device device = Device::kCpu;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape = {};
  std::array<int64_t, kMaxRank> strides = {};  // in elements; the last is 1 for every op here

  // A contiguous, row-major view.
  static TensorView Contiguous(void* data, DType dtype, Device device,
                               std::initializer_list<int64_t> dims) {
    GLOAM_CHECK(dims.size() <= kMaxRank);
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.device = device;
    view.rank = static_cast<int>(dims.size());
    int i = 0;
    for (int64_t dim : dims) view.shape[i++] = dim;
    int64_t stride = 1;
    for (int d = view.rank - 1; d >= 0; --d) {
      view.strides[d] = stride;
      stride *= view.shape[d];
    }
    return view;
  }

  int64_t num_elements() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }

  // Columns [begin, begin + count) of the last dimension, as a strided view.
  TensorView Columns(int64_t begin, int64_t count) const {
    GLOAM_CHECK(rank >= 1 && begin >= 0 && begin + count <= shape[rank - 1]);
    TensorView view = *this;
    view.data = static_cast<char*>(data) + begin * static_cast<int64_t>(DTypeBytes(dtype));
    view.shape[rank - 1] = count;
    return view;
  }

  // Rows [begin, begin + count) of the first dimension.
  TensorView Rows(int64_t begin, int64_t count) const {
    GLOAM_CHECK(rank >= 1 && begin >= 0 && begin + count <= shape[0]);
    TensorView view = *this;
    view.data =
        static_cast<char*>(data) + begin * strides[0] * static_cast<int64_t>(DTypeBytes(dtype));
    view.shape[0] = count;
    return view;
  }

  template <typename T>
  T* Data() const {
    GLOAM_CHECK(sizeof(std::remove_const_t<T>) == DTypeBytes(dtype));
    return static_cast<T*>(data);
  }
};

}  // namespace gloam
