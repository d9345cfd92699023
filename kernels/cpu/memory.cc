#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "kernels/cpu/cpu_kernels.h"

namespace gloam::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// From here on a buffer lies in huge pages. A pass over all weights with 4 KiB pages reads at 21
// instead of 32 GB/s: the hardware's prefetchers stop at page ends (EPYC Zen 4 in a virtual
// machine, 2 threads, SmolLM2-135M, 2026-11-23).
constexpr size_t kLeastHugeBytes = size_t{128} << 10;

void Unmap(void* data, size_t bytes) { munmap(data, bytes); }
void Free(void* data, size_t /*bytes*/) { std::free(data); }

Status OutOfMemory(size_t bytes) {
  return ResourceExhausted("cannot allocate {} bytes: {}", bytes, std::strerror(errno));
}

// Maps `length` bytes, a multiple of the huge page, at a multiple of `alignment`; null on failure.
// Pages come from the kernel zeroed, when they are first touched: a large KV pool costs nothing
// until it is used.
char* MapAligned(size_t length, size_t alignment) {
  const size_t mapped_length = length + alignment;
  if (mapped_length < length) return nullptr;
  void* mapped =
      mmap(nullptr, mapped_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = std::bit_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  char* data = static_cast<char*>(mapped) + (aligned - begin);
  if (aligned > begin) munmap(mapped, aligned - begin);
  if (const size_t tail = begin + mapped_length - (aligned + length); tail > 0) {
    munmap(data + length, tail);
  }
  madvise(data, length, MADV_HUGEPAGE);  // a wish: the system may have it off
  return data;
}

StatusOr<Buffer> MapBuffer(size_t bytes) {
  if (bytes > SIZE_MAX - kHugePage) return OutOfMemory(bytes);
  const size_t length = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  char* data = MapAligned(length, kHugePage);
  if (data == nullptr) return OutOfMemory(bytes);
  return Buffer(data, length, &Unmap);
}

// Buffers smaller than a huge page, one after the other in chunks of huge pages, so that the
// weights of a model lie in the order in which they were loaded. A chunk goes back to the system
// with its last buffer. Any thread.
class HugePageArena {
 public:
  StatusOr<Buffer> Allocate(size_t bytes) {
    const size_t length = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard lock(mutex_);
    if (chunk_ == nullptr || used_ + length > kChunkBytes) {
      char* const next = MapAligned(kChunkBytes, kChunkBytes);
      if (next == nullptr) return OutOfMemory(bytes);
      if (chunk_ != nullptr) Release(chunk_);
      chunk_ = next;
      used_ = kAlignment;
      new (chunk_) std::atomic<int64_t>(1);  // this arena's own hold
    }
    char* const data = chunk_ + used_;
    used_ += length;
    NumHolds(chunk_).fetch_add(1, std::memory_order_relaxed);
    return Buffer(data, length, [](void* from, size_t) { Release(from); });
  }

 private:
  static constexpr size_t kChunkBytes = 16 * kHugePage;

  // A chunk begins with the number of its buffers.
  static std::atomic<int64_t>& NumHolds(void* chunk) {
    return *static_cast<std::atomic<int64_t>*>(chunk);
  }
  static void Release(void* in_chunk) {
    void* chunk = static_cast<char*>(in_chunk) - std::bit_cast<uintptr_t>(in_chunk) % kChunkBytes;
    if (NumHolds(chunk).fetch_sub(1, std::memory_order_acq_rel) == 1) munmap(chunk, kChunkBytes);
  }

  std::mutex mutex_;
  char* chunk_ = nullptr;
  size_t used_ = 0;
};

}  // namespace

StatusOr<Buffer> AllocateBuffer(size_t bytes) {
  if (bytes >= kHugePage) return MapBuffer(bytes);
  if (bytes >= kLeastHugeBytes) {
    static auto& arena = *new HugePageArena;  // buffers may outlive every static
    return arena.Allocate(bytes);
  }
  const size_t length = (bytes + kAlignment) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, length);
  if (data == nullptr) return OutOfMemory(bytes);
  std::memset(data, 0, length);
  return Buffer(data, length, &Free);
}

void* Scratch::Get(size_t bytes) {
  if (buffer_.bytes() < bytes) {
    StatusOr<Buffer> larger = AllocateBuffer(bytes + bytes / 2);
    GLOAM_CHECK(larger.ok());
    buffer_ = std::move(*larger);
  }
  return buffer_.data();
}

}  // namespace gloam::cpu
