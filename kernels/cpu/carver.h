// Carver: hands out 64-byte aligned pieces of one allocation; with a null base it only counts.
#pragma once

#include <cstdint>

namespace gloam::cpu {

class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }

  int64_t used_bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace gloam::cpu
