// How busy the GPU is, kernel by kernel, without a profiler: a library that the CUDA driver loads
// into any program.
//
//   CUDA_INJECTION64_PATH=build/cuda/bench/libkernel_gaps.so
//     gloam bench step --random-weights llama-3.1-8b --context 2048 --steps 64
//
// At exit it prints one JSON line to stderr: of the last GLOAM_GAPS_SECONDS (default 0.25) before
// the last kernel ended, the share of time in which a kernel or a copy ran, and the kernels by
// their share of it.
#include <cupti.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Interval {
  uint64_t begin = 0, end = 0;  // ns
  std::string name;
};

std::mutex mutex;
std::vector<Interval> intervals;  // guarded by mutex

void Check(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return;
  const char* message = nullptr;
  cuptiGetResultString(result, &message);
  std::fprintf(stderr, "kernel_gaps: %s: %s\n", what, message);
  std::exit(1);
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  constexpr size_t kBytes = size_t{8} << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBytes));
  *size = *buffer == nullptr ? 0 : kBytes;
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
      intervals.push_back({kernel->start, kernel->end, kernel->name});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
      intervals.push_back({copy->start, copy->end, "(copy)"});
    }
  }
  std::free(buffer);
}

// "void gloam::cuda::F<...>(...)" mangled is long: the name without template arguments is enough.
std::string ShortName(const std::string& name) {
  const size_t begin = name.find("gloam");
  return name.substr(begin == std::string::npos ? 0 : begin, 60);
}

void Report() {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  std::lock_guard lock(mutex);
  if (intervals.empty()) {
    std::fprintf(stderr, "{\"kernels\": 0}\n");
    return;
  }
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  uint64_t last = 0;
  for (const Interval& interval : intervals) last = std::max(last, interval.end);
  const char* seconds = std::getenv("GLOAM_GAPS_SECONDS");
  const auto window = static_cast<uint64_t>((seconds == nullptr ? 0.25 : std::atof(seconds)) * 1e9);
  const uint64_t from = last > window ? last - window : 0;

  uint64_t busy = 0, reached = 0, first = 0;
  size_t count = 0;
  std::map<std::string, uint64_t> by_name;  // time added to the union by each, overlap aside
  for (const Interval& interval : intervals) {
    if (interval.begin < from) continue;
    if (count++ == 0) first = reached = interval.begin;
    const uint64_t begin = std::max(reached, interval.begin);
    if (interval.end <= begin) continue;
    busy += interval.end - begin;
    by_name[ShortName(interval.name)] += interval.end - begin;
    reached = interval.end;
  }
  if (count == 0 || reached == first) return;
  const double span = static_cast<double>(reached - first);
  std::fprintf(stderr,
               "{\"kernels\": %zu, \"span_ms\": %.3f, \"busy_percent\": %.2f, \"by_kernel\": {",
               count, span / 1e6, 100 * static_cast<double>(busy) / span);
  const char* separator = "";
  for (const auto& [name, ns] : by_name) {
    std::fprintf(stderr, "%s\"%s\": %.2f", separator, name.c_str(),
                 100 * static_cast<double>(ns) / span);
    separator = ", ";
  }
  std::fprintf(stderr, "}}\n");
}

}  // namespace

// The entry point that the driver calls.
extern "C" int InitializeInjection() {
  Check(cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer), "callbacks");
  Check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
  Check(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "copies");
  std::atexit(Report);
  return 1;
}
