#include "kernels/cpu/vnni.h"

#include <atomic>

namespace gloam::cpu {
namespace {

std::atomic<bool> vnni_disabled{false};

}  // namespace

bool UseVnni() {
#if defined(__x86_64__)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return has_vnni && !vnni_disabled.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void DisableVnniForTest(bool disable) { vnni_disabled.store(disable); }

}  // namespace gloam::cpu
