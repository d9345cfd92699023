// MappedFile: a whole file mapped read-only. Owns the mapping (move-only); any thread may read.
// The file must not shrink while it is mapped: the system would answer a read with SIGBUS.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

#include "base/status.h"

namespace gloam {

class MappedFile {
 public:
  // Errors: kNotFound (no such file), kInvalidArgument (not a regular file, or empty),
  // kUnavailable (the system refuses); each names the file.
  [[nodiscard]] static StatusOr<MappedFile> Open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  explicit MappedFile(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::span<const std::byte> bytes_;  // page-aligned; empty after a move
};

// False also where the system does not let us look.
bool FileExists(const std::filesystem::path& path);

}  // namespace gloam
