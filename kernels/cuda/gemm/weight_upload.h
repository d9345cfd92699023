// Brings weights from a mapped file to the device: threads copy pieces into pinned memory while
// earlier pieces are on the bus or being repacked. Owned by the GEMM backend while a model loads;
// Upload is called by one thread at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/weight.h"

namespace gloam::cuda {

class WeightUploader {
 public:
  // Called on one of the uploader's threads: enqueues on `stream` what makes of rows
  // [first_row, first_row + num_rows), lying at `raw` on the device as in the file, their part of
  // the weight.
  using Place = std::function<void(const void* raw, int64_t first_row, int64_t num_rows,
                                   cudaStream_t stream)>;

  WeightUploader();
  ~WeightUploader();

  // Stacks `parts` by rows. Pieces begin at multiples of `row_group` rows. When this returns, the
  // raw data has been read, and what is enqueued on `after` from now on sees the whole weight.
  // `direct`, if not null, is where the rows go as they are; then `place` is not called.
  // Errors: kResourceExhausted with the size of the staging memory.
  [[nodiscard]] Status Upload(std::span<const RawWeight> parts, int64_t row_group, void* direct,
                              const Place& place, cudaStream_t after);

 private:
  struct Lane;

  std::vector<std::unique_ptr<Lane>> lanes_;  // one a thread
};

}  // namespace gloam::cuda
