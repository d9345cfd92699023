#include "kernels/cuda/gemm/weight_upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <utility>

#include "base/check.h"

namespace gloam::cuda {
namespace {

// A piece takes about 1 ms to copy and 0.2 ms on the bus: long beside a launch, short beside a
// weight.
constexpr int64_t kPieceBytes = 8 << 20;
// One core copies 5-10 GB/s; PCIe 5 takes about 50.
constexpr int kMaxThreads = 8;
constexpr int kSlots = 2;  // of a thread: one being filled, one on its way

// Rows [first, first + count) of the stacked parts.
void CopyRows(std::span<const RawWeight> parts, int64_t row_bytes, int64_t first, int64_t count,
              std::byte* out) {
  for (const RawWeight& part : parts) {
    if (first < part.rows && count > 0) {
      const int64_t here = std::min(count, part.rows - first);
      std::memcpy(out, part.data + first * row_bytes, here * row_bytes);
      out += here * row_bytes;
      count -= here;
      first = 0;
    } else {
      first -= std::min(first, part.rows);
    }
  }
}

}  // namespace

// One thread's stream and staging memory.
struct WeightUploader::Lane {
  struct Slot {
    Buffer host;
    Buffer device;
    Event free;  // what was staged here has been taken
  };

  Stream stream;
  Event done;
  Slot slots[kSlots];
  int next_slot = 0;

  Status Prepare(bool needs_device) {
    for (Slot& slot : slots) {
      if (slot.host.data() == nullptr) {
        GLOAM_ASSIGN_OR_RETURN(slot.host, AllocatePinned(kPieceBytes));
      }
      if (needs_device && slot.device.data() == nullptr) {
        GLOAM_ASSIGN_OR_RETURN(slot.device, AllocateDevice(kPieceBytes));
      }
    }
    return OkStatus();
  }
};

WeightUploader::WeightUploader() = default;

WeightUploader::~WeightUploader() {
  for (const auto& lane : lanes_) cudaStreamSynchronize(lane->stream.get());
}

Status WeightUploader::Upload(std::span<const RawWeight> parts, int64_t row_group, void* direct,
                              const Place& place, cudaStream_t after) {
  const int64_t row_bytes = RowBytes(parts[0].type, parts[0].cols);
  int64_t num_rows = 0;
  for (const RawWeight& part : parts) num_rows += part.rows;
  GLOAM_CHECK(row_group * row_bytes <= kPieceBytes);
  const int64_t piece_rows = kPieceBytes / (row_group * row_bytes) * row_group;
  const int64_t num_pieces = (num_rows + piece_rows - 1) / piece_rows;
  const int64_t max_threads =
      std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, kMaxThreads);
  const auto num_threads = static_cast<size_t>(std::min(num_pieces, max_threads));
  while (lanes_.size() < num_threads) lanes_.push_back(std::make_unique<Lane>());
  for (size_t i = 0; i < num_threads; ++i) {
    GLOAM_RETURN_IF_ERROR(lanes_[i]->Prepare(direct == nullptr));
  }

  std::atomic<int64_t> next_piece = 0;
  const auto run = [&](Lane& lane) {
    for (int64_t piece; (piece = next_piece++) < num_pieces;) {
      Lane::Slot& slot = lane.slots[lane.next_slot++ % kSlots];
      GLOAM_CUDA_CHECK(cudaEventSynchronize(slot.free.get()));
      const int64_t first = piece * piece_rows;
      const int64_t count = std::min(piece_rows, num_rows - first);
      CopyRows(parts, row_bytes, first, count, static_cast<std::byte*>(slot.host.data()));
      void* to = direct != nullptr ? static_cast<std::byte*>(direct) + first * row_bytes
                                   : slot.device.data();
      GLOAM_CUDA_CHECK(cudaMemcpyAsync(to, slot.host.data(), count * row_bytes,
                                       cudaMemcpyHostToDevice, lane.stream.get()));
      if (direct == nullptr) place(to, first, count, lane.stream.get());
      GLOAM_CUDA_CHECK(cudaEventRecord(slot.free.get(), lane.stream.get()));
    }
    GLOAM_CUDA_CHECK(cudaEventRecord(lane.done.get(), lane.stream.get()));
  };
  std::vector<std::exception_ptr> failures(num_threads);
  {
    std::vector<std::jthread> threads;
    for (size_t i = 0; i < num_threads; ++i) {
      threads.emplace_back([&, i] {
        try {
          run(*lanes_[i]);
        } catch (...) {
          failures[i] = std::current_exception();
        }
      });
    }
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
  for (size_t i = 0; i < num_threads; ++i) {
    GLOAM_CUDA_CHECK(cudaStreamWaitEvent(after, lanes_[i]->done.get()));
  }
  return OkStatus();
}

}  // namespace gloam::cuda
