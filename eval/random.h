// Random: seeded draws that are the same on every platform (the distributions of the standard
// library are not). Used by the generators of tasks. One thread.
#pragma once

#include <cstdint>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"

namespace gloam {

// FNV-1a over the bytes of `text`: names of random streams and of runs.
inline uint64_t HashText(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

class Random {
 public:
  // A stream of its own for every seed and name: what an item draws depends on neither the other
  // items nor their order.
  Random(uint64_t seed, std::string_view name) : engine_(seed ^ HashText(name)) {}

  int64_t Below(int64_t n) {  // [0, n)
    GLOAM_CHECK(n > 0);
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n));  // n is far below 2^64
  }
  int64_t Between(int64_t first, int64_t last) { return first + Below(last - first + 1); }
  double Unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }  // [0, 1)

  template <typename Range>
  const auto& Pick(const Range& range) {
    return range[static_cast<size_t>(Below(static_cast<int64_t>(std::size(range))))];
  }

  template <typename T>
  void Shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<size_t>(Below(static_cast<int64_t>(i)))]);
    }
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace gloam
