// Runs a fuzz target over the files of a folder, each also cut short and with bits flipped, where
// no fuzzer is built in: an ordinary test of the committed corpus.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kVariantsPerFile = 2000;
constexpr uint32_t kSeed = 1;

void RunOne(const std::vector<uint8_t>& bytes) {
  // A block of exactly this size, so that a sanitizer sees any read past its end.
  const auto copy = std::make_unique<uint8_t[]>(bytes.size());
  std::copy(bytes.begin(), bytes.end(), copy.get());
  LLVMFuzzerTestOneInput(copy.get(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER\n", argv[0]);
    return 2;
  }
  std::mt19937 random(kSeed);
  int num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream in(entry.path(), std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(in), {}};
    ++num_files;
    RunOne(bytes);
    if (bytes.empty()) continue;
    for (int i = 0; i < kVariantsPerFile; ++i) {
      std::vector<uint8_t> changed = bytes;
      if (i % 4 == 0) changed.resize(random() % bytes.size());
      for (uint32_t flips = random() % 4; flips > 0 && !changed.empty(); --flips) {
        changed[random() % changed.size()] = static_cast<uint8_t>(random());
      }
      RunOne(changed);
    }
  }
  std::printf("%d files, %d variants of each, seed %u\n", num_files, kVariantsPerFile, kSeed);
  return num_files > 0 ? 0 : 1;
}
