#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/cpu_kernels.h"

namespace gloam::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;

void Unmap(void* data, size_t bytes) { munmap(data, bytes); }
void Free(void* data, size_t /*bytes*/) { std::free(data); }

// Pages come from the kernel zeroed, when they are first touched: a large KV pool costs nothing
// until it is used. Aligned to huge pages, which spare most of the TLB misses of a pass over all
// weights.
StatusOr<Buffer> MapBuffer(size_t bytes) {
  const auto failed = [&] {
    return ResourceExhausted("cannot allocate {} bytes: {}", bytes, std::strerror(errno));
  };
  const size_t length = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const size_t mapped_length = length + kHugePage;
  if (mapped_length < bytes) return ResourceExhausted("cannot allocate {} bytes", bytes);
  void* mapped =
      mmap(nullptr, mapped_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return failed();
  const auto begin = std::bit_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
  char* data = static_cast<char*>(mapped) + (aligned - begin);
  if (aligned > begin) munmap(mapped, aligned - begin);
  if (const size_t tail = begin + mapped_length - (aligned + length); tail > 0) {
    munmap(data + length, tail);
  }
  madvise(data, length, MADV_HUGEPAGE);  // a wish: the system may have it off
  return Buffer(data, length, &Unmap);
}

}  // namespace

StatusOr<Buffer> AllocateBuffer(size_t bytes) {
  if (bytes >= kHugePage) return MapBuffer(bytes);
  const size_t length = (bytes + kAlignment) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, length);
  if (data == nullptr) return ResourceExhausted("cannot allocate {} bytes", bytes);
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
