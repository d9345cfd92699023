#include "models/pull.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <vector>

#include "models/mapped_file.h"
#include "models/part_fetcher.h"
#include "models/sha256.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;

constexpr size_t kCopyBytes = 1 << 20;

// An open file; closed at the end of the scope.
class File {
 public:
  File(const fs::path& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC, 0644)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

Status SystemError(std::string_view what, const fs::path& path, int error) {
  const StatusCode code = error == ENOSPC || error == EDQUOT ? StatusCode::kResourceExhausted
                                                             : StatusCode::kUnavailable;
  return MakeStatus(code, "{}: cannot {}: {}", path.string(), what, std::strerror(error));
}

// The bytes of a file, or of all files below a folder; 0 where there is none.
int64_t BytesBelow(const fs::path& path) {
  std::error_code error;
  if (fs::is_regular_file(path, error)) return static_cast<int64_t>(fs::file_size(path, error));
  int64_t total = 0;
  for (fs::recursive_directory_iterator it(path, error), end; !error && it != end;
       it.increment(error)) {
    std::error_code gone;  // the client moves its files about meanwhile
    if (it->is_regular_file(gone)) {
      const uintmax_t bytes = it->file_size(gone);
      if (!gone) total += static_cast<int64_t>(bytes);
    }
  }
  return total;
}

// One pull: where its pieces lie, and what is left to do.
class Pull {
 public:
  Pull(const CatalogEntry& entry, const PullOptions& options)
      : entry_(entry),
        options_(options),
        target_(options.folder / (entry.name + ".gguf")),
        staging_(options.folder / ".pull" / entry.name) {}

  StatusOr<fs::path> Run() {
    if (FileExists(target_)) return target_;
    std::error_code error;
    fs::create_directories(staging_, error);
    if (error) return SystemError("make the folder", staging_, error.value());
    const File lock(options_.folder / ".pull" / (entry_.name + ".lock"), O_RDWR | O_CREAT);
    if (lock.fd() < 0) return SystemError("write", options_.folder / ".pull", errno);
    if (flock(lock.fd(), LOCK_EX | LOCK_NB) != 0) {
      return Unavailable("another pull of {} is running", entry_.name);
    }
    if (FileExists(target_)) return target_;  // finished before we had the lock
    fs::create_directories(staging_, error);
    GLOAM_RETURN_IF_ERROR(CheckDiskSpace());
    for (int i = 0; i < num_parts(); ++i) GLOAM_RETURN_IF_ERROR(Fetch(i));
    GLOAM_RETURN_IF_ERROR(Assemble());
    fs::remove_all(staging_, error);  // what stays behind is harmless
    return target_;
  }

 private:
  int num_parts() const { return static_cast<int>(entry_.source.parts.size()); }
  const CatalogSource::Part& part(int i) const { return entry_.source.parts[i]; }
  fs::path PartPath(int i) const { return staging_ / fmt::format("part{:03}", i + 1); }
  bool IsFetched(int i) const { return BytesBelow(PartPath(i)) == part(i).bytes; }

  void Report(PullProgress::Stage stage, int i, int64_t bytes) const {
    if (!options_.progress) return;
    options_.progress({.stage = stage,
                       .part = i,
                       .num_parts = num_parts(),
                       .bytes_done = std::min(bytes, entry_.bytes),
                       .bytes_total = entry_.bytes});
  }

  // A client holds a part twice at its peak, packed and unpacked; several parts stay until the
  // whole file has been put together.
  Status CheckDiskSpace() const {
    int64_t largest = 0, missing = 0;
    for (int i = 0; i < num_parts(); ++i) {
      if (!IsFetched(i)) {
        missing += part(i).bytes;
        largest = std::max(largest, part(i).bytes);
      }
    }
    const int64_t needed = missing + largest + (num_parts() > 1 ? entry_.bytes : 0);
    std::error_code error;
    const fs::space_info space = fs::space(options_.folder, error);
    if (error || space.available >= static_cast<uintmax_t>(needed)) return OkStatus();
    return ResourceExhausted("{}: pulling {} needs {} MB of free disk space and {} MB are left",
                             options_.folder.string(), entry_.name, needed / 1'000'000 + 1,
                             space.available / 1'000'000);
  }

  // Leaves part `i` at PartPath(i); it gets that name only when it is whole.
  Status Fetch(int i) const {
    int64_t before = 0;
    for (int j = 0; j < i; ++j) before += part(j).bytes;
    if (!IsFetched(i)) {
      Report(PullProgress::Stage::kDownload, i, before);
      const fs::path folder = staging_ / "download";
      std::error_code error;
      fs::remove_all(folder, error);
      fs::create_directories(folder, error);
      if (error) return SystemError("make the folder", folder, error.value());
      const auto tick = [&] {
        // Packed and unpacked bytes are there at once near the end.
        const int64_t growth = std::min(BytesBelow(folder), part(i).bytes);
        Report(PullProgress::Stage::kDownload, i, before + growth);
      };
      GLOAM_ASSIGN_OR_RETURN(const fs::path file,
                             FetchPart(entry_.source.kind, part(i), folder, tick));
      const int64_t bytes = BytesBelow(file);
      if (bytes != part(i).bytes) {
        return InvalidArgument("{} of {} {} has {} bytes; the catalogue says {}", part(i).file,
                               part(i).package, part(i).version, bytes, part(i).bytes);
      }
      fs::rename(file, PartPath(i), error);
      if (error) return SystemError("rename", file, error.value());
      fs::remove_all(folder, error);
    }
    Report(PullProgress::Stage::kDownload, i, before + part(i).bytes);
    return OkStatus();
  }

  // Joins the parts, checks the hash, and gives the file its name.
  Status Assemble() const {
    const bool join = num_parts() > 1;
    const fs::path whole = join ? staging_ / "whole" : PartPath(0);
    GLOAM_ASSIGN_OR_RETURN(const std::string sha256, join ? Join(whole) : Hash(whole));
    if (sha256 != entry_.sha256) {
      std::error_code error;
      fs::remove_all(staging_, error);  // nothing of it can be trusted
      return InvalidArgument(
          "{}: what was fetched has the SHA-256 {}; the catalogue says {}. It "
          "has been removed",
          entry_.name, sha256, entry_.sha256);
    }
    const File file(whole, O_RDONLY);
    if (file.fd() < 0 || fsync(file.fd()) != 0) return SystemError("sync", whole, errno);
    std::error_code error;
    fs::rename(whole, target_, error);
    if (error) return SystemError("rename", whole, error.value());
    return OkStatus();
  }

  StatusOr<std::string> Hash(const fs::path& path) const {
    Sha256 hash;
    int64_t done = 0;
    GLOAM_RETURN_IF_ERROR(Read(0, path, -1, &hash, &done));
    return hash.HexDigest();
  }

  // Concatenates the parts into `path`; returns the hash of all.
  StatusOr<std::string> Join(const fs::path& path) const {
    const File out(path, O_WRONLY | O_CREAT | O_TRUNC);
    if (out.fd() < 0) return SystemError("write", path, errno);
    Sha256 hash;
    int64_t done = 0;
    for (int i = 0; i < num_parts(); ++i) {
      GLOAM_RETURN_IF_ERROR(Read(i, PartPath(i), out.fd(), &hash, &done));
    }
    return hash.HexDigest();
  }

  // Adds a file to `hash`, and to `out` unless that is -1.
  Status Read(int i, const fs::path& path, int out, Sha256* hash, int64_t* done) const {
    const File in(path, O_RDONLY);
    if (in.fd() < 0) return SystemError("open", path, errno);
    std::vector<std::byte> buffer(kCopyBytes);
    while (true) {
      const ssize_t size = read(in.fd(), buffer.data(), buffer.size());
      if (size < 0) return SystemError("read", path, errno);
      if (size == 0) return OkStatus();
      const std::span<const std::byte> bytes(buffer.data(), static_cast<size_t>(size));
      hash->Update(bytes);
      for (size_t written = 0; out >= 0 && written < bytes.size();) {
        const ssize_t wrote = write(out, bytes.data() + written, bytes.size() - written);
        if (wrote < 0) return SystemError("write", staging_, errno);
        written += static_cast<size_t>(wrote);
      }
      *done += size;
      Report(PullProgress::Stage::kCheck, i, *done);
    }
  }

  const CatalogEntry& entry_;
  const PullOptions& options_;
  const fs::path target_;   // <folder>/<name>.gguf
  const fs::path staging_;  // <folder>/.pull/<name>: finished parts, and the download under way
};

}  // namespace

StatusOr<fs::path> PullModel(const CatalogEntry& entry, const PullOptions& options) {
  return Pull(entry, options).Run();
}

}  // namespace gloam
