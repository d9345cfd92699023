// What the CUDA backend's operations share: the device's facts and the one stream that all of them
// run on, in order. Owned by CudaOps; engine thread only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "base/status.h"
#include "kernels/cuda/check.h"
#include "kernels/ops.h"

namespace gloam::cuda {

// Move-only owner of a stream that does not synchronise with the default stream.
class Stream {
 public:
  Stream() { GLOAM_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(Stream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~Stream() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Move-only owner of an event; without timing unless asked for.
class Event {
 public:
  explicit Event(unsigned flags = cudaEventDisableTiming) {
    GLOAM_CUDA_CHECK(cudaEventCreateWithFlags(&event_, flags));
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

struct DeviceContext {
  CudaOptions options;
  cudaStream_t stream = nullptr;
  int num_sms = 0;
  int compute_capability = 0;  // 10 * major + minor
  int max_shared_bytes = 0;    // of one thread block, opted in
  int64_t l2_bytes = 0;
};

// memory.cc. Device memory, zeroed; pinned host memory, zeroed. Errors: kResourceExhausted with the
// sizes asked for and free.
[[nodiscard]] StatusOr<Buffer> AllocateDevice(size_t bytes);
[[nodiscard]] StatusOr<Buffer> AllocatePinned(size_t bytes);

}  // namespace gloam::cuda
