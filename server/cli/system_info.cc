#include "server/cli/system_info.h"

#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <sstream>
#include <string_view>

namespace gloam {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// The value of `key` in a file of "key : value" lines; empty where there is none.
std::string FindLine(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t colon = line.find(':');
    if (colon == line.npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == line.npos ? std::string() : line.substr(begin);
  }
  return {};
}

int64_t MemInfoBytes(std::string_view key) {
  std::istringstream text(FindLine("/proc/meminfo", key));
  int64_t kilobytes = 0;
  text >> kilobytes;
  return kilobytes * 1024;
}

// A number in a file of the control group; "max" and a missing file mean no limit.
int64_t ControlGroupBytes(const char* path) {
  std::ifstream file(path);
  int64_t bytes = 0;
  return file >> bytes ? bytes : kNoLimit;
}

}  // namespace

std::string CpuModelName() {
  const std::string name = FindLine("/proc/cpuinfo", "model name");
  return name.empty() ? "unknown CPU" : name;
}

std::string CpuFeatures() {
  constexpr std::array kUseful = {"sse4_2",   "avx",      "avx2",        "fma",         "f16c",
                                  "avx512f",  "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni",
                                  "amx_int8", "amx_bf16", "asimd",       "asimddp"};
  std::istringstream flags(FindLine("/proc/cpuinfo", "flags") + " " +
                           FindLine("/proc/cpuinfo", "Features"));
  std::string found;
  for (std::string flag; flags >> flag;) {
    if (std::find(kUseful.begin(), kUseful.end(), flag) == kUseful.end()) continue;
    if (!found.empty()) found += ' ';
    found += flag;
  }
  return found;
}

int UsableCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

int64_t TotalMemoryBytes() {
  return std::min(MemInfoBytes("MemTotal"), ControlGroupBytes("/sys/fs/cgroup/memory.max"));
}

int64_t AvailableMemoryBytes() {
  const int64_t limit = ControlGroupBytes("/sys/fs/cgroup/memory.max");
  const int64_t used = ControlGroupBytes("/sys/fs/cgroup/memory.current");
  const int64_t in_group = limit == kNoLimit || used == kNoLimit ? kNoLimit : limit - used;
  return std::max<int64_t>(0, std::min(MemInfoBytes("MemAvailable"), in_group));
}

int64_t RaiseFileDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 0;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) getrlimit(RLIMIT_NOFILE, &limit);
  return static_cast<int64_t>(limit.rlim_cur);
}

}  // namespace gloam
